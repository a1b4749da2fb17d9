"""What can be wrong with an artifact, by name (docs/format.md, section 'Validation')."""

from __future__ import annotations

from ..errors import ArtifactError


class MissingFileError(ArtifactError):
    """A file of the folder is absent or is no regular file."""


class UnsafePathError(ArtifactError):
    """A file name that would leave the folder: a path, '..', an absolute name or a symlink out."""


class FileTooLargeError(ArtifactError):
    """A manifest or header longer than any real one; refused before it is parsed."""


class InvalidJsonError(ArtifactError):
    """Text that is not strict JSON: syntax, NaN, Infinity, too deep, not UTF-8, not an object."""


class DuplicateKeyError(InvalidJsonError):
    """A JSON object names one key twice: readers would disagree on which one counts."""


class UnsupportedVersionError(ArtifactError):
    """A schema version that this qdit does not read, older or newer."""


class UnknownKeyError(ArtifactError):
    """A key that the schema does not have."""


class MissingKeyError(ArtifactError):
    """A key that the schema demands."""


class InvalidValueError(ArtifactError):
    """A value of the wrong type or outside its range."""


class UnknownFamilyError(ArtifactError):
    """A model family that this qdit does not have."""


class InvalidConfigError(ArtifactError):
    """A model config that cannot be built, or would build something gigantic."""


class InvalidPlanError(ArtifactError):
    """A plan that does not fit the model."""


class InvalidTieError(ArtifactError):
    """A tie between modules that do not exist or do not match."""


class InvalidHeaderError(ArtifactError):
    """A safetensors header that breaks that format's rules."""


class TruncatedFileError(ArtifactError):
    """A file that ends before its own header or the manifest says."""


class SizeMismatchError(ArtifactError):
    """Sizes that contradict each other: file, header, offsets, shapes."""


class UnknownTensorError(UnknownKeyError):
    """A tensor that the model and plan do not call for."""


class MissingTensorError(MissingKeyError):
    """A tensor that the model and plan call for."""


class WrongDtypeError(ArtifactError):
    """A tensor of another dtype than the format demands."""


class ShapeMismatchError(ArtifactError):
    """A shape other than the one that config and plan give."""


class HashMismatchError(ArtifactError):
    """The file's bytes are not those that the manifest was written for."""


class NonFiniteError(ArtifactError):
    """NaN or infinity among scales or parameters."""


class ScaleRangeError(ArtifactError):
    """A scale that is zero or negative."""


class PaddingError(ArtifactError):
    """Padding bits that are not zero: the same integers would have two encodings."""
