"""A call of a generating function of the service: its photograph, prompt and answer, whatever the arguments' order."""

import inspect
import io
import logging
import os
import tempfile
from pathlib import Path

from .log import say

_UNSET = object()
PHOTO_NAMES = (
    "image_path",
    "image",
    "img_path",
    "photo_path",
    "image_file",
    "images",
    "photo",
    "file_path",
    "filepath",
)
PROMPT_NAMES = ("full_prompt", "prompt", "formatted_prompt", "text")


class Call:
    """A call of a generating function of the service: where its photograph and its prompt are among the arguments."""

    def __init__(self, function, args: tuple, kwargs: dict):
        self.function, self.args, self.kwargs = function, list(args), dict(kwargs)
        try:
            names = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            names = []
        at = dict(zip(names, range(len(self.args)), strict=False))
        self.photo = next((name for name in PHOTO_NAMES if name in self.kwargs or name in at), None)
        self.photo_at = at.get(self.photo)
        named = next((name for name in PROMPT_NAMES if name in self.kwargs or name in at), None)
        prompt = self.kwargs.get(named) if named in self.kwargs else self.args[at[named]] if named else ""
        self.prompt = prompt if isinstance(prompt, str) else ""

    def _photo(self, value=_UNSET):
        place = self.kwargs if self.photo in self.kwargs else self.args
        key = self.photo if place is self.kwargs else self.photo_at
        if value is not _UNSET:
            place[key] = value
        return place[key]

    def rewind(self) -> None:
        """Let a second attempt read an open file from its start again."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, io.BytesIO):
                value.seek(0)


class prepared:
    """Within it, the photograph among a call's arguments is the one that training would see (None: as it came)."""

    def __init__(self, call: Call, max_image_size: int | None):
        self.call, self.size, self.files = call, max_image_size, []

    def __enter__(self):
        if self.size is None or self.call.photo is None:
            self.before = _UNSET
            return
        self.before = self.call._photo()
        from .photo import PhotoError  # Pillow: slow to import

        try:
            self.call._photo(self.prepare(self.before))
        except PhotoError as error:
            say(logging.WARNING, f"left as it is: {error}")  # the service has its own answer to such a file

    def __exit__(self, *exception):
        if self.before is not _UNSET:
            self.call._photo(self.before)
        for path in self.files:
            Path(path).unlink(missing_ok=True)

    def prepare(self, photo):
        """Return the photograph as training sees it, in the form in which it came: path, bytes, file, picture, list."""
        from PIL import Image

        from .photo import load_photo, prepare_image

        if isinstance(photo, list | tuple):
            return type(photo)(self.prepare(one) for one in photo)
        if isinstance(photo, Image.Image):
            return prepare_image(photo, self.size)
        if isinstance(photo, str | os.PathLike) and os.path.isfile(photo):
            picture = load_photo(photo, self.size)
            handle, path = tempfile.mkstemp(suffix=".png", prefix="lora_patch_")
            self.files.append(path)
            with open(handle, "wb") as file:
                picture.save(file, "PNG", compress_level=1)
            return type(photo)(path) if isinstance(photo, str) else Path(path)
        if isinstance(photo, bytes | io.BytesIO):
            raw = io.BytesIO(photo) if isinstance(photo, bytes) else photo
            raw.seek(0)
            out = io.BytesIO()
            load_photo(raw, self.size).save(out, "PNG", compress_level=1)
            out.seek(0)
            return out.getvalue() if isinstance(photo, bytes) else out
        return photo
