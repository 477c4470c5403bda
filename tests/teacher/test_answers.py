"""Teachers of many kinds: each is accepted, and then answers alike in any batch, or refused with the reason."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from logitcache.cache.cache import open_cache
from logitcache.config.recipe import load_recipe
from logitcache.errors import RecipeError
from logitcache.planning.plan import plan
from logitcache.teacher.answers import BOUNDS, examples_of
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher, build_teacher
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE32, Pixels, recipe, run, teacher
from tests.fixes import applied, called, entries, fix_of, keywords
from tests.teacher.nets import CLASSES, FEATURES, SIDE, Net

IMAGES = Pixels(40, side=SIDE)
VIEW = {"num_views": 1, "seed": 3}
PRECISIONS = ("float32", "bfloat16")


class Odd(nn.Module):
    """A small network whose features, or answers, one function changes."""

    def __init__(self, change: Callable[[Any, Tensor], Any] = lambda net, x: x, last: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.3)
            self.attention = nn.MultiheadAttention(8, 2)
            self.fc = nn.Linear(8, CLASSES)
        self.change, self.last = change, last
        self.calls = 0
        self.buffer = torch.zeros(64, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).relu().mean(dim=(2, 3))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Any:
        values = self.features(images)
        if self.last:
            return self.change(self, self.fc(values))
        return self.fc(self.change(self, values))


class Batch(Odd):
    """Normalises by the statistics of the batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, **options)


class Training(Odd):
    """Leaves a module in training mode, whatever is asked."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.train()
        return self


def reused(net: Any, answers: Tensor) -> Tensor:
    return torch.as_tensor(net.buffer[: len(answers)].copy_(answers))


def counted(net: Any, answers: Tensor) -> Tensor:
    net.calls += 1
    return answers + 0.3 * net.calls


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.trace(Odd().eval(), torch.rand(2, 3, SIDE, SIDE))  # type: ignore[no-any-return, no-untyped-call]


def exported(dynamic: bool = True) -> nn.Module:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    found: nn.Module = torch.export.export(
        Plain().eval(), (torch.rand(4, 3, SIDE, SIDE),), dynamic_shapes=shapes
    ).module()
    return found


class Plain(nn.Sequential):
    def __init__(self, *last: nn.Module, outputs: int = CLASSES) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
            super().__init__(*layers, nn.Flatten(), nn.Dropout(0.5), *(last or [nn.Linear(8, outputs)]))


class Headless(nn.Module):
    """A network whose head was replaced by nothing."""

    def __init__(self, nothing: nn.Module) -> None:
        super().__init__()
        self.body, self.fc = Plain(nn.Identity()), nothing

    def forward(self, images: Tensor) -> Any:
        return self.fc(self.body(images))


class ModelOutput(OrderedDict[str, Any]):
    """As transformers returns them: a dictionary whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def timm_without_head() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=SIDE, patch_size=4)  # type: ignore[no-any-return]


ACCEPTED: dict[str, Callable[[], nn.Module]] = {
    "plain": Odd,
    "an identity after the head": lambda: Plain(nn.Linear(8, CLASSES), nn.Identity()),
    "a reused buffer": lambda: Odd(reused, last=True),
    "traced": traced,
    "exported": exported,
    "an output object": lambda: Odd(lambda net, x: SimpleNamespace(logits=x, states=(x, x)), last=True),
    "a Hugging Face output": lambda: Odd(lambda net, x: ModelOutput(logits=x, hidden_states=(x,)), last=True),
    "a dictionary of logits": lambda: Odd(lambda net, x: {"aux": x, "logits": x}, last=True),
    "a dictionary of one entry": lambda: Odd(lambda net, x: {"out": x}, last=True),
    "a tuple of one": lambda: Odd(lambda net, x: (x,), last=True),
    "one logit": lambda: Plain(outputs=1),
}

DROPOUT, STATISTICS = "draws random numbers, as dropout", "BatchNorm takes mean and variance from the batch, in 'norm'"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout left on": (lambda: Odd(lambda net, x: functional.dropout(x, 0.2)), DROPOUT),
    "a dropout in training mode": (lambda: Odd(lambda net, x: net.drop.train()(x)), rf"(?s){DROPOUT}.*are 'drop'"),
    "noise": (lambda: Odd(lambda net, x: x + 0.3 * torch.rand_like(x)), DROPOUT),
    "batch statistics": (lambda: Batch(track_running_stats=False), STATISTICS),
    "normalisation in training mode": (Training, STATISTICS),
    "a mean over the batch": (lambda: Odd(lambda net, x: x - x.mean(dim=0)), "computes across the images of a batch"),
    "attention over the batch": (
        lambda: Odd(lambda net, x: 9 * net.attention(*[9 * x[:, None]] * 3)[0][:, 0]),
        "computes across the images of a batch",
    ),
    "a counter": (lambda: Odd(counted, last=True), "keeps state between passes"),
    "exported for one batch size": (
        lambda: exported(dynamic=False),
        r"in a batch of 32: (Guard failed|Expected input).*\n.*Dim\(",
    ),
    "one image loses its axis": (lambda: Odd(lambda net, x: x.squeeze(0), last=True), r"returned \[5\], not logits"),
    "two entries": (lambda: Odd(lambda net, x: {"a": x, "b": x}, last=True), r"a dict of \{a: \[32, 5\], b: \[32, 5"),
    "a tuple of two": (lambda: Odd(lambda net, x: (x, x), last=True), r"a tuple of \{\[32, 5\], \[32, 5\]\}, not log"),
    "a Hugging Face body": (
        lambda: Odd(lambda net, x: ModelOutput(last_hidden_state=x[:, None], pooler_output=x), last=True),
        r"a ModelOutput of \{last_hidden_state: \[32, 1, 5\], pooler_output: \[32, 5\]\}, not logits",
    ),
    "no head": (lambda: Headless(nn.Identity()), "has no head: the 8 numbers"),
    "an empty head": (lambda: Headless(nn.Sequential()), "has no head: the 8 numbers"),
    "no head, of timm": (timm_without_head, "has no head: the 64 numbers"),
    "maps": (lambda: nn.Conv2d(3, 8, 3), r"returned \[32, 8, 6, 6\], not logits"),
}


def kept(path: Path, net: nn.Module, batch_size: int = 32) -> Tensor:
    run(path, IMAGES, net, teachers={"t": teacher(DENSE32)}, batch_size=batch_size, views=VIEW)
    logits = open_cache(path).rows([ViewKey(0, index) for index in range(len(IMAGES))])["t"].logits
    assert isinstance(logits, Tensor)
    return logits


@contextmanager
def around(net: nn.Module | None, precision: str = "float32", **entry: Any) -> Iterator[Teacher]:
    """Build a teacher around a network, or by an entry."""
    loaded = load_recipe({"cache": "c", "teachers": {"t": teacher(precision=precision, **entry)}}, PrecomputeRecipe)
    built = build_teacher("t", loaded.teachers["t"], net, None, 3, torch.device("cpu"))
    yield built
    built.remove_taps()


def pixels_of(count: int = 32, side: int = SIDE) -> Tensor:
    return torch.from_numpy(Pixels(count, side=side).images).permute(0, 3, 1, 2)


def answers(built: Teacher, pixels: Tensor) -> Tensor:
    return torch.as_tensor(built(pixels, torch.full((len(pixels),), -1)).logits)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ACCEPTED)
def test_an_accepted_teacher_answers_alike_whatever_the_batch_size(kind: str, precision: str) -> None:
    pixels = pixels_of(32)
    with around(ACCEPTED[kind](), precision) as built:
        examples = torch.as_tensor(examples_of([built], pixels, torch.full((32,), -1))["t"].logits)
        spread = float((examples - examples.mean(dim=0)).square().mean().sqrt())
        assert spread > 0
        for size in (1, 5, 31):
            found = torch.cat([answers(built, part) for part in pixels.split(size)])
            assert float((found - examples).abs().max()) <= 4 * BOUNDS[precision] * spread


@pytest.mark.parametrize("kind", ["a reused buffer", "exported", "traced", "a Hugging Face output"])
def test_a_cache_of_an_accepted_teacher_does_not_depend_on_the_batch_size(kind: str, tmp_path: Path) -> None:
    found = [kept(tmp_path / str(size), ACCEPTED[kind](), size) for size in (7, 40)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(found[0].unique(dim=0)) == len(IMAGES)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_teacher_whose_answers_cannot_be_kept_is_refused(kind: str, precision: str) -> None:
    build, message = REFUSED[kind]
    with around(build(), precision) as built, pytest.raises(RecipeError, match=message) as caught:
        examples_of([built], pixels_of(32), torch.full((32,), -1))
    assert caught.value.exit_code == 2
    assert "Fix: " in str(caught.value)


class Wrapped(nn.Module):
    """What the fix of a network that returns more than logits names: a module that returns these alone."""

    def __init__(self, net: nn.Module, logits_in: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.net, self.logits_in = net, logits_in

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_in(self.net(images))


def with_statistics(fix: str) -> nn.Module:
    """Return the network that normalised by the batch, with the option that its fix names, and statistics."""
    net = Batch(**keywords(fix))
    net.train()(pixels_of().float())
    return net


def exported_by(fix: str) -> nn.Module:
    found = called(fix.replace("…", "net, images"), torch=torch, net=Plain().eval(), images=(torch.rand(4, 3, 8, 8),))
    return found.module()  # type: ignore[no-any-return]


def attending(fix: str) -> nn.Module:
    net = Odd(lambda net, x: 9 * net.attention(*[9 * x[:, None]] * 3)[0][:, 0])
    net.attention = nn.MultiheadAttention(8, 2, batch_first=keywords(fix)["batch_first"])
    return net


def normalised_by(fix: str) -> nn.Module:
    mean, variance = torch.zeros(8), torch.ones(8)
    training = keywords(fix)["training"]
    return Odd(lambda net, x: functional.batch_norm(x, mean, variance, training=training))


FIXED: dict[str, tuple[str, Callable[[str], nn.Module]]] = {
    "dropout left on": (
        "F.dropout(",
        lambda fix: Odd(lambda net, x: called(fix, F=functional, x=x, p=0.2, self=net)),
    ),
    "a dropout in training mode": ("let eval() reach every module", lambda fix: Odd(lambda net, x: net.drop(x))),
    "noise": (
        "nothing drawn in evaluation mode",
        lambda fix: Odd(lambda net, x: x + 0.3 * torch.rand_like(x) if net.training else x),
    ),
    "batch statistics": ("track_running_stats=True, with weights that hold the statistics", with_statistics),
    "normalisation in training mode": ("let eval() reach every module", lambda fix: Odd()),
    "a mean over the batch": ("F.batch_norm with running statistics and training=False", normalised_by),
    "attention over the batch": ("attention with batch_first=True", attending),
    "a counter": ("no counters", lambda fix: Odd(last=True)),
    "exported for one batch size": ("torch.export.export(", exported_by),
    "one image loses its axis": (
        "wrap it in a module",
        lambda fix: Wrapped(REFUSED["one image loses its axis"][0](), lambda x: x.reshape(-1, CLASSES)),
    ),
    "two entries": ("wrap it in a module", lambda fix: Wrapped(REFUSED["two entries"][0](), lambda x: x["b"])),
    "a tuple of two": ("wrap it in a module", lambda fix: Wrapped(REFUSED["a tuple of two"][0](), lambda x: x[0])),
    "a Hugging Face body": (
        "wrap it in a module",
        lambda fix: Wrapped(REFUSED["a Hugging Face body"][0](), lambda x: x["pooler_output"]),
    ),
    "maps": ("wrap it in a module", lambda fix: Wrapped(REFUSED["maps"][0](), lambda x: x.mean(dim=(2, 3)))),
}


def test_every_refusal_has_a_fix_that_is_carried_out() -> None:
    """Heads that are missing have a test of their own, below."""
    assert {kind for kind in REFUSED if "head" not in kind} == FIXED.keys()


@pytest.mark.parametrize("kind", FIXED)
def test_what_a_refusal_advises_is_accepted(kind: str) -> None:
    text, build = FIXED[kind]
    pixels, labels = pixels_of(), torch.full((32,), -1)
    with around(REFUSED[kind][0]()) as built, pytest.raises(RecipeError) as caught:
        examples_of([built], pixels, labels)
    fix = fix_of(caught.value)
    assert text in fix
    with around(build(fix)) as built:
        assert examples_of([built], pixels, labels)["t"].logits.shape[0] == 32


def test_nothing_is_written_of_a_teacher_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=STATISTICS):
        kept(tmp_path / "c", Batch(track_running_stats=False))
    assert not list(tmp_path.iterdir())


def test_plan_refuses_what_precompute_refuses(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "c", views=VIEW)
    with pytest.raises(RecipeError, match=STATISTICS):
        plan(wanted, teachers={"t": Batch(track_running_stats=False)}, dataset=Pixels(40))


def test_repair_and_growth_refuse_a_teacher_that_changed_its_ways(tmp_path: Path) -> None:
    """The same weights, so that nothing else would notice."""
    kept(tmp_path / "c", Odd())
    with pytest.raises(RecipeError, match=DROPOUT):
        kept(tmp_path / "c", Odd(lambda net, x: functional.dropout(x, 0.2)))


@pytest.mark.parametrize("name", ["pooled", "maps", "attention", "cam"])
@pytest.mark.parametrize("with_logits", [True, False])
def test_every_target_counts(name: str, with_logits: bool, tmp_path: Path) -> None:
    """Of a network that mixes images at the tap, and takes that back before its logits."""

    class Mixing(Net):
        def forward(self, images: Tensor) -> Tensor:
            maps = self.conv(images.double()).relu()
            mixed = self.relu(maps + (shift := maps.mean(dim=0)))
            return self.fc(self.tokens((mixed - shift).flatten(2).transpose(1, 2)).tanh().mean(dim=1))

    entry = teacher(features={name: FEATURES[name]}) | ({} if with_logits else {"logits": None})
    if name == "cam":
        entry["features"][name]["tap"] = "relu"
    with pytest.raises(RecipeError, match=f"in another batch: {name} differ by"):
        run(tmp_path / "c", IMAGES, Mixing(), teachers={"t": entry}, views=VIEW)


@pytest.mark.parametrize("build", [lambda: Headless(nn.Identity()), timm_without_head])
def test_the_line_that_a_headless_teacher_is_shown_keeps_its_features(build: Any, tmp_path: Path) -> None:
    net = build()
    with pytest.raises(RecipeError) as caught:
        kept(tmp_path / "c", net)
    fixed = applied({"teachers": {"t": teacher()}}, *entries(fix_of(caught.value)))
    run(tmp_path / "c", IMAGES, net, **fixed, views=VIEW)
    assert open_cache(tmp_path / "c").features("t")["embedding"].kind == "pooled"


HONEST = {"squeezenet1_1": ("torchvision", 32), "test_resnet": ("timm", 32), "test_convnext": ("timm", 32)}


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", HONEST)
def test_real_models_with_random_weights_pass(name: str, precision: str) -> None:
    kind, side = HONEST[name]
    pytest.importorskip(kind)
    model: dict[str, Any] = {"kind": kind, "name": name}
    model |= {"weights": None} if kind == "torchvision" else {"pretrained": False}
    with around(None, precision, model=model) as built:
        examples_of([built], pixels_of(9, side), torch.full((9,), -1))


def test_a_buffer_that_is_used_again_does_not_change_what_was_answered() -> None:
    with around(Odd(reused, last=True), features={"all": {"kind": "maps", "tap": "fc"}}) as built:
        first = built(pixels_of(4), torch.full((4,), -1))
        before = first.logits.clone(), first.features["all"].clone()
        answers(built, 255 - pixels_of(4))
        assert torch.equal(first.logits, before[0])
        assert torch.equal(first.features["all"], before[1])
