"""Networks on disk: a spec as JSON, parameters as safetensors with the spec in the file's header."""

from taylorfx.store.document import FileError
from taylorfx.store.files import cut_file, load, save
from taylorfx.store.schema import from_json, to_json

__all__ = ["FileError", "cut_file", "from_json", "load", "save", "to_json"]
