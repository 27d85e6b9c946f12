"""Everything this library raises on purpose.

ElastiError
├── CapacityError       a capacity outside its range, or of a form that does not exist
├── AdapterError        a saved adapter that does not fit this base model, or cannot be read
├── BaseModelError      a base model that cannot be found or loaded
├── CacheFull           no room for the keys and values of one more sequence
├── InputError          a prompt that the model cannot take: too long, empty, an unknown token
└── UnsupportedModel    an architecture that none of our families describes
"""


class ElastiError(Exception):
    """The root: catch this to catch everything the library refuses."""


class CapacityError(ElastiError):
    """A capacity outside its range, an unknown unit, or a share that is not a number."""


class AdapterError(ElastiError):
    """An adapter that does not fit its base model; the message lists every misfit at once."""


class BaseModelError(ElastiError):
    """A base model that is not where its name says, or cannot be read."""


class InputError(ElastiError):
    """A prompt that the model cannot take."""


class CacheFull(ElastiError):
    """Fewer free blocks of the key-value cache than a sequence needs."""


class UnsupportedModel(ElastiError):
    """An architecture without an entry among ours; the message names what is missing."""
