"""Errors on their way between processes."""

import pickle

from unianom.errors import ImageError


def test_an_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("too_large", "20000 x 20000 pixels")))
    assert (error.status, str(error)) == ("too_large", "20000 x 20000 pixels")
