"""A call of a generating function of the service: its photograph, prompt and answer, whatever the arguments' order."""

import contextlib
import inspect
import io
import logging
import os
import tempfile
import time
from pathlib import Path

from .log import say

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
        self.at = dict(zip(names, range(len(self.args)), strict=False))  # positions, by name
        self.photo_name, self.prompt_name = map(self._first, (PHOTO_NAMES, PROMPT_NAMES))
        self.photo, prompt = self._get(self.photo_name), self._get(self.prompt_name)
        self.prompt = prompt if isinstance(prompt, str) else ""
        self.prepared = self.photo  # until `prepare_photo`
        self.files: list[str] = []
        self.left = False  # nobody reads the answer any more

    def _first(self, names: tuple[str, ...]) -> str | None:
        """Return the first of these names that an argument was given for."""
        return next((name for name in names if name in self.kwargs or name in self.at), None)

    def _get(self, name: str | None):
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[self.at[name]] if name in self.at else None

    def _put(self, name: str | None, value) -> None:
        if name in self.kwargs:
            self.kwargs[name] = value
        elif name in self.at:
            self.args[self.at[name]] = value

    @property
    def is_of_mlx_vlm(self) -> bool:
        """Tell whether the function is mlx_vlm's generate or stream_generate, as it is."""
        function = inspect.unwrap(self.function)
        module = getattr(function, "__module__", None) or ""
        return module.split(".")[0] == "mlx_vlm" and function.__name__ in ("generate", "stream_generate")

    def use_photo(self, photo) -> None:
        """Put a photograph, original or prepared, among the arguments."""
        self._put(self.photo_name, photo)

    def photos(self) -> list:
        """Return the photographs as they stand among the arguments now."""
        photo = self._get(self.photo_name)
        return list(photo) if isinstance(photo, list | tuple) else [] if photo is None else [photo]

    def use_prompt(self, prompt: str) -> None:
        """Put another prompt among the arguments."""
        self._put(self.prompt_name, prompt)

    def prepare_photo(self, max_image_size: int) -> None:
        """Fill `prepared` with the photograph as training sees it.

        mlx-vlm's functions get pictures; a function of the service gets it in its original form.
        """
        from .photo import PhotoError  # Pillow: slow to import

        try:
            self.prepared = self._prepare(self.photo, max_image_size)
            if self.is_of_mlx_vlm and self.photo is not None and not isinstance(self.prepared, list | tuple):
                self.prepared = [self.prepared]
        except PhotoError as error:
            say(logging.WARNING, f"left as it is: {error}")  # the service has its own answer to such a file

    def rewind(self) -> None:
        """Let a second attempt read an open file from its start again."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, io.BytesIO):
                value.seek(0)

    def remove_files(self) -> None:
        """Remove the files that prepared photographs were written to."""
        for path in self.files:
            Path(path).unlink(missing_ok=True)

    def _prepare(self, photo, size: int):
        from PIL import Image

        from .photo import load_photo, prepare_image

        if isinstance(photo, list | tuple):
            return type(photo)(self._prepare(one, size) for one in photo)
        if isinstance(photo, Image.Image):
            return prepare_image(photo, size)
        if isinstance(photo, str | os.PathLike) and os.path.isfile(photo):
            picture = load_photo(photo, size)
            if self.is_of_mlx_vlm:
                return picture
            handle, path = tempfile.mkstemp(suffix=".png", prefix="lora_patch_")
            self.files.append(path)
            with open(handle, "wb") as file:
                picture.save(file, "PNG", compress_level=1)
            return type(photo)(path) if isinstance(photo, str) else Path(path)
        if isinstance(photo, bytes | io.BytesIO):
            raw = io.BytesIO(photo) if isinstance(photo, bytes) else photo
            raw.seek(0)
            out = io.BytesIO()
            load_photo(raw, size).save(out, "PNG", compress_level=1)
            out.seek(0)
            return out.getvalue() if isinstance(photo, bytes) else out
        return photo


def sweep_photos(older_than: float = 3600) -> None:
    """Remove the prepared photographs that killed services left in the temporary folder; in seconds."""
    for path in Path(tempfile.gettempdir()).glob("lora_patch_*.png"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than:
                path.unlink()
