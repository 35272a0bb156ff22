"""The layers: frozen dataclasses with the names, numerics and initialization of ``torch.nn``."""

from taylorfx.layers.activation import *
from taylorfx.layers.activation import __all__ as _activation
from taylorfx.layers.attention import *
from taylorfx.layers.attention import __all__ as _attention
from taylorfx.layers.base import LAYERS, Layer, Leaves, Shape, ShapeError, kind
from taylorfx.layers.conv import *
from taylorfx.layers.conv import __all__ as _conv
from taylorfx.layers.dense import *
from taylorfx.layers.dense import __all__ as _dense
from taylorfx.layers.experts import *
from taylorfx.layers.experts import __all__ as _experts
from taylorfx.layers.norm import *
from taylorfx.layers.norm import __all__ as _norm
from taylorfx.layers.pool import *
from taylorfx.layers.pool import __all__ as _pool
from taylorfx.layers.recurrent import *
from taylorfx.layers.recurrent import __all__ as _recurrent
from taylorfx.layers.shape import *
from taylorfx.layers.shape import __all__ as _shape
from taylorfx.layers.tensor import *
from taylorfx.layers.tensor import __all__ as _tensor

__all__ = ["LAYERS", "Layer", "Leaves", "Shape", "ShapeError", "kind"]
__all__ += _activation + _attention + _conv + _dense + _experts + _norm + _pool + _recurrent + _shape + _tensor
