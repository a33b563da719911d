"""Runs on disk: folders of plain files, listed and read as tables. Knows no model and needs no jax."""

from pluralprefs.registry.comparison import compare_runs as compare_runs
from pluralprefs.registry.files import RegistryError as RegistryError
from pluralprefs.registry.files import StillRunning as StillRunning
from pluralprefs.registry.files import load_arrays as load_arrays
from pluralprefs.registry.files import save_arrays as save_arrays
from pluralprefs.registry.folder import RunFolder as RunFolder
from pluralprefs.registry.folder import create as create
from pluralprefs.registry.folder import open_run as open_run
from pluralprefs.registry.index import reindex as reindex
from pluralprefs.registry.labels import note as note
from pluralprefs.registry.labels import read_labels as read_labels
from pluralprefs.registry.labels import tag as tag
from pluralprefs.registry.pruning import prune as prune
from pluralprefs.registry.tables import find_run as find_run
from pluralprefs.registry.tables import list_runs as list_runs
from pluralprefs.registry.tables import load_table as load_table
from pluralprefs.registry.where import parse_where as parse_where
