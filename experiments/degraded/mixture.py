# SPDX-License-Identifier: Apache-2.0
"""Which degradations an image goes through and how strongly, and the parameter vector that says so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import degrade

KINDS = ("jpeg", "noise", "blur")
MIXTURES = ("one", "chain")
_UNCOMPRESSED = degrade.QUALITIES[1] + 1  # the quality that stands for no JPEG at all: strength 0


@dataclass(frozen=True)
class Worst:
    """The strongest degradation of each kind, strength 1: a JPEG quality, and sigmas in grey levels and pixels."""

    quality: int = 5
    noise: float = 100.0
    blur: float = 3.0

    def __post_init__(self):
        low, high = degrade.QUALITIES
        if not low <= self.quality <= high:
            raise ValueError(f"quality must be a whole number from {low} to {high}, not {self.quality}")
        degrade.check_sigma("noise", self.noise, degrade.MAX_NOISE)
        degrade.check_sigma("blur", self.blur, degrade.MAX_BLUR)


@dataclass(frozen=True)
class Condition:
    """Images all degraded alike. kind: one of KINDS, "chain" or "clean"; strength: 0 to 1.

    value: what that is in the kind's own unit, for example "27"; text: in words, "JPEG quality 27".
    vector: the parameter vector, one element per kind.
    """

    kind: str
    strength: float
    value: str
    text: str
    vector: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """kinds: which of KINDS there are. how: an image gets "one" of them, or all in a "chain".

    strengths: the lowest and the highest that draw() gives.

    The **parameter vector** of an image has one element for each of ``kinds``, in that order: its strength, from
    0 (not degraded so) to 1 (as ``worst``). Sigmas are proportional to it; JPEG qualities fall linearly with
    it and are whole numbers, so that there are strengths only for these.
    """

    kinds: tuple[str, ...]
    how: str
    worst: Worst
    strengths: tuple[float, float] = (0.0, 1.0)

    def draw(self, draws: np.random.Generator) -> np.ndarray:
        """A parameter vector, float32 [kinds]: uniform ``strengths``, with "one" of a kind drawn uniformly."""
        vector = draws.uniform(*self.strengths, len(self.kinds))
        if self.how == "one":
            vector *= np.arange(len(self.kinds)) == draws.integers(len(self.kinds))
        return self._settled(vector)

    def apply(self, image: np.ndarray, vector: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        """``image``, uint8 [C, H, W], degraded: in the order of a camera, blur by the optics, noise, compression."""
        strengths = dict(zip(self.kinds, map(float, vector), strict=True))
        if strengths.get("blur"):
            image = degrade.blur(image, self.value("blur", strengths["blur"]))
        if strengths.get("noise"):
            image = degrade.noise(image, self.value("noise", strengths["noise"]), draws)
        if strengths.get("jpeg"):
            image = degrade.jpeg(image, self.value("jpeg", strengths["jpeg"]))
        return image

    def value(self, kind: str, strength: float) -> float:
        """What a strength stands for: a JPEG quality (96: not compressed), a sigma in grey levels or pixels."""
        if kind == "jpeg":
            return round(_UNCOMPRESSED - strength * (_UNCOMPRESSED - self.worst.quality))
        return strength * getattr(self.worst, kind)

    def conditions(self, levels: int) -> list[Condition]:
        """Clean images, then each kind (or the chain of all) at ``levels`` strengths in equal steps up to 1."""
        found = [Condition("clean", 0.0, "none", "clean", (0.0,) * len(self.kinds))]
        groups = [self.kinds] if self.how == "chain" and len(self.kinds) > 1 else [(kind,) for kind in self.kinds]
        for group in groups:
            for strength in (level / levels for level in range(1, levels + 1)):
                vector = self._settled(np.array([strength if kind in group else 0.0 for kind in self.kinds]))
                text = ", ".join(self._text(kind, strength) for kind in group)
                single = len(group) == 1
                value = f"{self.value(group[0], strength):.3g}" if single else f"{strength:.3g}"
                name = group[0] if single else "chain"
                found.append(Condition(name, strength, value, text, tuple(vector.tolist())))
        return found

    def _settled(self, vector: np.ndarray) -> np.ndarray:
        """The nearest strengths that there are."""
        vector = vector.astype(np.float32)
        if "jpeg" in self.kinds:
            i = self.kinds.index("jpeg")
            vector[i] = (_UNCOMPRESSED - self.value("jpeg", float(vector[i]))) / (_UNCOMPRESSED - self.worst.quality)
        return vector

    def _text(self, kind: str, strength: float) -> str:
        what = {"jpeg": "JPEG quality", "noise": "noise sigma", "blur": "blur sigma"}[kind]
        return f"{what} {self.value(kind, strength):.3g}"
