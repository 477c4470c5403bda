"""`Teacher`: a frozen model that owns its normalisation; uint8 pixels in, `Targets` out."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from logitcache.cache.encodings import Encoding
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.features import Feature
from logitcache.cache.format.manifest import LOGITS, FeatureName, Output, TeacherEntry
from logitcache.classifier import PLAIN, Variant
from logitcache.config.recipe import Component
from logitcache.errors import DataError, RecipeError
from logitcache.logits import NO_LOGITS
from logitcache.models import (
    AnswersByKey,
    BuiltModel,
    Checkpoint,
    Classifier,
    Model,
    Preprocessing,
    resolve_preprocessing,
)
from logitcache.models.taps.layouts import TapLayout, layouts_of
from logitcache.models.taps.taps import Tapped
from logitcache.models.variants import Compiled, variant_of
from logitcache.runtime.device import Precision, autocast, own_randomness
from logitcache.targets import Targets
from logitcache.teacher.tap_gradients import tap_gradients

Outputs = Annotated[tuple[Output, ...] | dict[str, Output], Field(min_length=1)]


class TeacherSource(Component):
    """A teacher, and which of its outputs to store."""

    model: Model | None = Field(
        default=None,
        description="Model of the teacher; may be omitted only if `lc.precompute` is given the module itself.",
        examples=[{"kind": "timm", "name": "resnet50.a1_in1k"}],
    )
    preprocessing: Preprocessing | None = Field(
        default=None,
        description="Normalisation of the model's input; by default the model's own.",
        examples=[{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}],
    )
    precision: Precision = Field(
        default="float32", description="Precision of the forward pass; `bfloat16` and `float16` use autocast."
    )
    speed: Literal["auto"] | Variant | None = Field(
        default=None,
        description="Faster variant of the network: in channels-last memory format, with BatchNorm folded into "
        "convolutions, compiled, or several of these; rounding differs. `auto` times the first two and their "
        "combination before the first shard, and takes the fastest whose outputs agree with those of the plain "
        "network; the cache records it. By default the network runs as built.",
        examples=["auto", {"channels_last": True, "fold": True}],
    )
    classes: Outputs | None = Field(
        default=None,
        description="The network's output for each class of the data set, if it has more outputs: a list in the order "
        "of the classes, or a map from their names or indices. Other outputs are dropped before anything else is "
        "computed. By default all outputs are classes.",
        examples=[[1, 25, 30], {"n01443537": 1}],
    )
    logits: Encoding | None = Field(default=Dense(), description="Encoding of the logits; null stores only features.")
    features: dict[FeatureName, Feature] = Field(
        default={},
        description="Features to store, by names of your choice.",
        examples=[{"last": {"kind": "pooled", "tap": "layer4"}}],
    )

    @model_validator(mode="after")
    def _keeps_something(self) -> Self:
        if self.logits is None and not self.features:
            raise ValueError("logits: null keeps features alone, and there are none: name features, or leave it out")
        return self

    @field_validator("classes")
    @classmethod
    def _one_class_an_output(cls, classes: Outputs | None) -> Outputs | None:
        found: dict[int, list[object]] = {}
        for key, output in classes.items() if isinstance(classes, dict) else enumerate(classes or ()):
            found.setdefault(output, []).append(key)
        twice = {output: keys for output, keys in found.items() if len(keys) > 1}
        if twice:
            output, keys = next(iter(twice.items()))
            raise ValueError(f"output {output} is that of {keys[0]!r} and {keys[1]!r}: each class has its own")
        return classes

    def idle(self, epochs: float) -> str | None:
        """Return why `classes` choose nothing."""
        if self.classes is None or self.answers_logits:
            return None
        return "has classes, and keeps features alone, which have none. Fix: leave classes out"

    @property
    def answers_logits(self) -> bool:
        """Whether logits are needed: to be kept, or as that whose Grad-CAM maps are kept."""
        return self.logits is not None or any(feature.kind == "grad_cam" for feature in self.features.values())


class Teacher(nn.Module):
    """A classifier in evaluation mode: uint8 pixels in, `Targets` out, whose features are taken of its taps.

    `passes` counts the images that its network has taken, those of Grad-CAM maps twice. `variant` is that
    of the network that answers; `classifier` is the network as it was built.
    """

    def __init__(self, name: str, classifier: Classifier, source: TeacherSource, device: torch.device) -> None:
        super().__init__()
        self.name, self.precision, self.device = name, source.precision, device
        self.classifier = classifier.to(device).eval()
        self.features = features_of(name, source, classifier.module)
        plain = [feature.tap for feature in self.features.values() if feature.kind != "grad_cam"]
        graded = [feature.tap for feature in self.features.values() if feature.kind == "grad_cam"]
        self.answers_logits = source.answers_logits
        if isinstance(classifier.module, AnswersByKey):
            classifier.module.require_kept(f"teachers.{name}", self.answers_logits, bool(graded))
        self.passes = 0
        self._plain_taps, self._graded_taps = plain, tuple(dict.fromkeys(graded))
        self.answer_by(self.classifier, PLAIN)

    def answer_by(self, classifier: Classifier, variant: Variant) -> None:
        """Answer by the classifier that `variant_of` made for a variant of the network, from now on."""
        self._running, self.variant, who = classifier, variant, f"teacher {self.name!r}"
        self._tapped = Tapped(classifier.module, classifier.module, self._plain_taps, who)
        self._forward = Compiled(self._tapped) if variant.compile else self._tapped

    def variant_of(self, variant: Variant, image_shape: tuple[int, int, int]) -> Classifier:
        """Return a classifier of images [C, H, W] around a variant of the network; `classifier` if it is plain.

        No hooks are copied: `answer_by` comes next. Raises what copying or running the network raises.
        """
        self.remove_taps()
        plain = self.classifier
        if variant == PLAIN:
            return plain
        images = torch.zeros(2, *image_shape, dtype=torch.uint8, device=self.device)
        network = variant_of(plain.module, variant, plain.normalize(images))
        made = Classifier(network, plain.preprocessing, plain.classes, f"teacher {self.name!r}")
        return made.to(self.device).eval()

    @torch.no_grad()
    def decide_layouts(self, pixels: Tensor) -> None:
        """Decide where taps put their channels, by images uint8 [B, C, H, W]; raises RecipeError if it is ambiguous."""
        asked = [TapLayout(feature.tap, feature.layout) for feature in self.features.values()]
        if asked and not self.answers_by_key:
            inputs = self.classifier.normalize(pixels.to(self.device))
            with autocast(self.device, self.precision):
                found = layouts_of(self.classifier.module, inputs, asked, f"teacher {self.name!r}")
            pairs = zip(self.features.items(), found, strict=True)
            self.features = {name: feature.model_copy(update={"layout": layout}) for (name, feature), layout in pairs}

    @torch.no_grad()
    def forward(self, pixels: Tensor, labels: Tensor, keys: Sequence[tuple[int, int]] = ()) -> Targets:
        """Answer uint8 pixels [B, C, H, W] on the teacher's device: logits float32 [B, K], features float32 [B, ...].

        labels: int64 [B], -1 if there is none, or multi-hot [B, C]; a Grad-CAM map is of the one class that a label
        names, else of the answer. The answers are copies: a network may reuse its output buffer in the next pass.
        `keys` are those of the views, by which answers in files are found. Raises RecipeError if these are asked of
        other images.
        """
        if self.answers_by_key and len(keys) != len(pixels):
            raise RecipeError(
                f"teacher {self.name!r} is known by its answers in files, and answers no other images.\n"
                "  Fix: train from the cache, without --online"
            )
        with autocast(self.device, self.precision):
            inputs = (pixels, keys) if self.answers_by_key else (self._running.normalize(pixels),)
            output, tapped = self._forward(*inputs)
            self.passes += len(pixels) * self.passes_by_row
            logits = self._running.checked(output).to(torch.float32, copy=True) if self.answers_logits else None
            graded = {}
            if logits is not None and self._graded_taps:
                who = f"teacher {self.name!r}"
                graded = tap_gradients(self._running, self._graded_taps, who, pixels, labels, logits)
        features = {
            name: feature.take(*(graded[feature.tap] if feature.kind == "grad_cam" else (tapped[feature.tap], None)))
            for name, feature in self.features.items()
        }
        answers = Targets(NO_LOGITS if logits is None else logits, features)
        for name, values in tensors_of(answers).items():
            if len(values) != len(pixels):
                raise RecipeError(
                    f"teacher {self.name!r} returns {len(values)} rows of {name} for {len(pixels)} images"
                )
        return answers

    @property
    def answers_by_key(self) -> bool:
        """Whether its answers lie in files: no network takes the pixels."""
        return isinstance(self.classifier.module, AnswersByKey)

    @property
    def passes_by_row(self) -> int:
        """How often the network takes an image to answer it: twice with Grad-CAM maps, never if there is none."""
        return 0 if self.answers_by_key else 2 if self._graded_taps else 1

    def remove_taps(self) -> None:
        """Take the hooks off the network, which is the caller's."""
        self._tapped.close()


def features_of(name: str, source: TeacherSource, network: nn.Module) -> dict[str, Feature]:
    """Return the features of a teacher: those of its entry, and those that the encoding of its logits needs."""
    needed = {} if source.logits is None else source.logits.features(network)
    both = [feature for feature in needed if feature in source.features]
    if both:
        raise RecipeError(f"teachers.{name}: the logits are kept as the feature {both[0]!r}. Fix: name yours otherwise")
    return {**needed, **source.features}


def build_teacher(
    name: str,
    source: TeacherSource,
    module: nn.Module | None,
    num_classes: int | None,
    in_channels: int,
    device: torch.device,
    classes: tuple[int, ...] | None = None,
) -> Teacher:
    """Build a teacher from its recipe entry, or around the caller's own `module`.

    `num_classes` is for weights in a file, which do not record it. `classes` are the kept outputs of the network; it
    has others too, so `num_classes` is not theirs.
    """
    if isinstance(module, Classifier):
        built, classes = BuiltModel(module.module, module.preprocessing), classes or module.classes
    elif module is not None:
        built = BuiltModel(module, None)
    elif source.model is not None:
        with own_randomness(device, 0):  # random weights, if that is what is asked for, are the same in every run
            counted = isinstance(source.model, Checkpoint) and classes is None
            built = source.model.build(num_classes if counted else None, in_channels)
    else:
        raise RecipeError(f"teachers.{name} names no model. Fix: give `model:`, or pass the module itself")
    chosen = resolve_preprocessing(built, source.preprocessing, who=f"teachers.{name}")
    return Teacher(name, Classifier(built.module, chosen, classes, f"teacher {name!r}"), source, device)


def take_recorded(teacher: Teacher, entry: TeacherEntry, image_shape: tuple[int, int, int]) -> None:
    """Let a teacher answer images [C, H, W] by the variant of its network that a cache records."""
    if entry.speed is not None:
        teacher.answer_by(teacher.variant_of(entry.speed, image_shape), entry.speed)


def require_answers(teacher: Teacher, answers: Targets, entry: TeacherEntry, ids: Sequence[str]) -> None:
    """Raise if answers are not finite, or do not have the recorded shapes, naming the image."""
    shapes: dict[str, tuple[int, ...]] = {name: stored.shape for name, stored in entry.stored_features.items()}
    shapes |= {} if entry.num_classes is None else {LOGITS: (entry.num_classes,)}
    for name, values in tensors_of(answers).items():
        if tuple(values.shape[1:]) != shapes.get(name, values.shape[1:]):
            raise RecipeError(
                f"teacher {teacher.name!r} returns {name} {list(values.shape[1:])} for image {ids[0]!r}, and "
                f"{list(shapes[name])} before.\n  Fix: give every image as many"
            )
    require_finite(teacher, answers, ids)


def require_finite(teacher: Teacher, answers: Targets, ids: Sequence[str]) -> None:
    """Raise DataError naming the first image that is answered with inf or nan."""
    for name, values in tensors_of(answers).items():
        row = first_not_finite(values)
        if row is not None:
            raise DataError(
                f"teacher {teacher.name!r} answers image {ids[row]!r} with inf or nan ({name}).\n"
                + (
                    "  Fix: correct the teacher"
                    if teacher.precision == "float32"
                    else f"  Fix: teachers.{teacher.name}.precision: float32, if it overflows in {teacher.precision}"
                )
            )


def tensors_of(answers: Targets) -> dict[str, Tensor]:
    """Return logits, if there are any, and features by name."""
    logits = {LOGITS: answers.logits} if answers.keeps_logits else {}
    return logits | dict(answers.features)


def first_not_finite(values: Tensor) -> int | None:
    """Return the first row of [B, ...] that holds inf or nan."""
    # A sum with inf or nan in it is not finite, and summing is ten times as fast as checking each number. If a sum of
    # finite numbers overflows, each is checked.
    if not values.is_floating_point() or bool(torch.isfinite(values.sum(dtype=torch.float32))):
        return None
    wrong = ~torch.isfinite(values).reshape(len(values), -1).all(dim=1)
    return int(wrong.int().argmax()) if bool(wrong.any()) else None
