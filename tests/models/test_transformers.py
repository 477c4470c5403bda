"""Models of transformers: what they answer is what transformers answers, and what is refused."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional

from logitcache.errors import LogitCacheError, MissingExtraError, RecipeError
from logitcache.models import Classifier, StoredModel, Transformers, load_model, save_model, weights_digest
from logitcache.models.hugging_face.transformers import TransformersNetwork
from logitcache.models.taps.taps import Tapped
from tests.models.hugging_face import change_json, transformers, write_classifier, write_clip, write_siglip

LABELS = ("cat", "dog", "fish")


@pytest.fixture
def vit(tmp_path: Path) -> tuple[Path, Any]:
    return tmp_path / "vit", write_classifier(tmp_path / "vit")


def pixels(count: int = 2, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def classifier(folder: Path, **fields: Any) -> Classifier:
    built = Transformers(path=str(folder), **fields).build(None, 3)
    assert built.preprocessing is not None
    return Classifier(built.module.eval(), built.preprocessing)


def processed(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """What transformers' own processor makes of images."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    found: torch.Tensor = transformers.AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")
    return found["pixel_values"]  # type: ignore[no-any-return,call-overload]


@torch.no_grad()
def test_a_classifier_answers_as_transformers_does(vit: tuple[Path, Any]) -> None:
    folder, model = vit
    expected = model(processed(folder, pixels())).logits
    torch.testing.assert_close(classifier(folder)(pixels()), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("resample", [2, 3])
def test_images_of_another_size_are_resized_as_the_processor_does(resample: int, tmp_path: Path) -> None:
    model = write_classifier(tmp_path, processor={"resample": resample})
    # Pillow rounds to whole pixels, and cuts at 0 and 255, after each axis: smooth images keep within a step.
    smooth = functional.interpolate(pixels(size=5).float(), 50, mode="bilinear").to(torch.uint8)
    found, expected = classifier(tmp_path).normalize(smooth), processed(tmp_path, smooth)
    assert float((found - expected).abs().max()) < 1.5 / 255 / 0.5
    torch.testing.assert_close(classifier(tmp_path)(smooth), model(expected).logits, atol=1e-2, rtol=0)
    other = {2: "bicubic", 3: "bilinear"}[resample]
    unlike = classifier(tmp_path).preprocessing.model_copy(update={"interpolation": other})
    assert float((Classifier(model, unlike).normalize(smooth) - expected).abs().max()) > 1.5 / 255 / 0.5


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 0.5, 0.5),
    ],
)
def test_rescaling_and_normalisation_are_one_mean_and_std(
    stated: dict[str, Any], mean: float, std: float, tmp_path: Path
) -> None:
    write_classifier(tmp_path, processor=stated)
    found = classifier(tmp_path)
    assert found.preprocessing.mean == pytest.approx((mean,) * 3)
    assert found.preprocessing.std == pytest.approx((std,) * 3)
    torch.testing.assert_close(found.normalize(pixels()), processed(tmp_path, pixels()), atol=1e-5, rtol=0)


def test_the_crop_decides_the_size(tmp_path: Path) -> None:
    write_clip(tmp_path)
    found = classifier(tmp_path, task="zero_shot", labels=LABELS).preprocessing
    assert (found.size, found.interpolation) == ((32, 32), "bicubic")


@pytest.mark.parametrize(("entry", "named"), [({"resample": 1}, "filter 1"), ({"do_flip_channel_order": True}, "flip")])
def test_a_processor_of_other_steps_leaves_the_preprocessing_to_the_user(
    entry: dict[str, Any], named: str, vit: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    change_json(vit[0] / "preprocessor_config.json", **entry)
    assert Transformers(path=str(vit[0])).build(None, 3).preprocessing is None
    assert named in caplog.text
    assert "Fix: give `preprocessing:`" in caplog.text


def test_taps_are_the_paths_of_transformers(vit: tuple[Path, Any]) -> None:
    module = Transformers(path=str(vit[0])).build(None, 3).module.eval()
    output, found = Tapped(module, module, ["vit.layernorm"], "t")(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(module.classifier(found["vit.layernorm"][:, 0]), output.logits)  # type: ignore[operator]


@torch.no_grad()
def test_features_of_a_classifier_and_of_clip_are_those_of_the_network_inside(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "vit")
    found = Transformers(path=str(tmp_path / "vit"), task="features").build(None, 3).module.eval()
    images = torch.zeros(1, 3, 32, 32)
    expected = model.vit(images).last_hidden_state  # type: ignore[operator,union-attr]
    torch.testing.assert_close(found(images).last_hidden_state, expected)
    clip = write_clip(tmp_path / "clip")
    tower = Transformers(path=str(tmp_path / "clip"), task="features").build(None, 3).module.eval()
    torch.testing.assert_close(tower(images).pooler_output, clip.vision_model(images).pooler_output)  # type: ignore[operator,union-attr]


@torch.no_grad()
@pytest.mark.parametrize("write", [write_clip, write_siglip])
def test_zero_shot_logits_are_those_of_the_model_with_both_towers(write: Any, tmp_path: Path) -> None:
    model = write(tmp_path)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        [f"a photo of a {label}." for label in LABELS],
        **({"padding": "max_length", "max_length": 16} if write is write_siglip else {"padding": True}),
        return_tensors="pt",
    )
    if write is write_siglip:
        tokens = {"input_ids": tokens["input_ids"]}
    else:
        tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    expected = model(pixel_values=processed(tmp_path, pixels(5)), **tokens).logits_per_image
    found = classifier(tmp_path, task="zero_shot", labels=LABELS)(pixels(5))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert len(set(found.argsort(dim=1).flatten().tolist())) == 3


@torch.no_grad()
def test_a_label_is_the_mean_of_its_templates(tmp_path: Path) -> None:
    model = write_clip(tmp_path)
    templates = ("a photo of a {}.", "the {drawing} of the {}")
    both = classifier(tmp_path, task="zero_shot", labels=LABELS, templates=templates).module.head.weight
    each = []
    for template in templates:
        tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(
            [template.replace("{}", label) for label in LABELS], padding=True, return_tensors="pt"
        )
        text = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output  # type: ignore[operator]
        each.append(text / text.norm(dim=-1, keepdim=True))
    mean = (each[0] + each[1]) / 2
    expected = mean / mean.norm(dim=-1, keepdim=True) * model.logit_scale.exp()  # type: ignore[operator]
    torch.testing.assert_close(both, expected, atol=2e-5, rtol=1e-5)


def test_the_head_of_labels_is_the_same_after_noise_in_the_last_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path)
    entry = Transformers(path=str(tmp_path), task="zero_shot", labels=LABELS)
    first = weights_digest(entry.build(None, 3).module)
    plain = torch.nn.functional.normalize
    noisy = lambda value, **options: plain(value, **options) * (1 + 1e-13)  # noqa: E731
    monkeypatch.setattr("logitcache.models.hugging_face.zero_shot.functional.normalize", noisy)
    assert weights_digest(entry.build(None, 3).module) == first


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task": "zero_shot"}, "two or more names"),
        ({"task": "zero_shot", "labels": ("cat", "dog", "cat")}, "'cat' is there twice"),
        ({"labels": ("cat", "dog")}, "labels are of task: zero_shot"),
        ({"task": "zero_shot", "labels": ("cat", "dog"), "templates": ("a photo",)}, "no place for a label"),
    ],
)
def test_labels_that_make_no_classifier_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Transformers(path="x", **fields)


def test_templates_of_another_task_are_an_option_without_effect() -> None:
    assert "Fix: leave them out" in str(Transformers(path="x", templates=("a {}",)).idle(1))
    assert Transformers(path="x").idle(1) is None


def test_a_zero_shot_teacher_is_no_student_and_needs_two_towers(tmp_path: Path) -> None:
    write_classifier(tmp_path / "vit")
    entry = Transformers(path=str(tmp_path / "vit"), task="zero_shot", labels=LABELS)
    with pytest.raises(RecipeError, match=r"compares no images with text(.|\n)*Fix"):
        entry.build(None, 3)
    with pytest.raises(RecipeError, match=r"is a teacher(.|\n)*new_head: true"):
        entry.build(3, 3)


def test_another_number_of_classes_takes_a_new_head_which_keeps_every_other_weight(vit: tuple[Path, Any]) -> None:
    with pytest.raises(RecipeError, match="pretrained for 3 classes, 7 are asked for"):
        Transformers(path=str(vit[0])).build(7, 3)
    state = Transformers(path=str(vit[0]), new_head=True).build(7, 3).module.state_dict()
    assert state["classifier.weight"].shape == (7, 16)
    before = vit[1].state_dict()
    assert {name for name in state if not torch.equal(state[name], before[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_refused(channels: int, vit: tuple[Path, Any]) -> None:
    with pytest.raises(RecipeError, match=f"takes 3 channels, the images have {channels}"):
        Transformers(path=str(vit[0])).build(None, channels)
    with pytest.raises(RecipeError, match=f"takes 3 channels, the images have {channels}"):
        Transformers(path=str(vit[0])).architecture().build(5, channels)


def test_a_run_of_it_is_loaded_without_the_folder_it_came_from(vit: tuple[Path, Any], tmp_path: Path) -> None:
    entry = Transformers(path=str(vit[0]), new_head=True)
    built = entry.build(5, 3)
    assert built.preprocessing is not None
    stored = StoredModel(model=entry.architecture(), preprocessing=built.preprocessing, num_classes=5, in_channels=3)
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", built.module, stored)
    vit[0].rename(tmp_path / "gone")
    assert weights_digest(load_model(tmp_path / "run").module) == weights_digest(built.module)


def test_what_is_pickled_is_refused_unread(vit: tuple[Path, Any]) -> None:
    (vit[0] / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"holds no weights"):
        Transformers(path=str(vit[0])).build(None, 3)
    (vit[0] / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(RecipeError, match=r"pytorch_model\.bin, which is pickled(.|\n)*save_pretrained"):
        Transformers(path=str(vit[0])).build(None, 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": None}, "names no `model_type`"),
        ({"model_type": "vit_of_ours"}, r"of type 'vit_of_ours'(.|\n)*Fix"),
        ({"model_type": "llama"}, r"cannot be built(.|\n)*Fix"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights"),
        ({"hidden_size": "many"}, r"cannot be built(.|\n)*Fix"),
        ({"hidden_size": 48}, r"cannot be built|lack"),
    ],
)
def test_settings_of_another_network_are_refused(changes: dict[str, Any], named: str, vit: tuple[Path, Any]) -> None:
    change_json(vit[0] / "config.json", **changes)
    with pytest.raises(RecipeError, match=named):
        Transformers(path=str(vit[0])).build(None, 3)


def test_code_and_kernels_that_settings_name_are_not_loaded(vit: tuple[Path, Any]) -> None:
    code = "open('PWNED', 'w')"
    (vit[0] / "modeling.py").write_text(code)
    (vit[0] / "configuration.py").write_text(code)
    change_json(
        vit[0] / "config.json",
        auto_map={"AutoConfig": "configuration.C", "AutoModelForImageClassification": "modeling.M"},
        attn_implementation="evil/kernels",
        _attn_implementation="evil/kernels",
    )
    change_json(vit[0] / "preprocessor_config.json", auto_map={"AutoImageProcessor": "modeling.P"})
    built = Transformers(path=str(vit[0])).build(None, 3)
    assert built.preprocessing is not None
    assert "evil" not in Transformers(path=str(vit[0])).architecture().model_dump_json()
    assert "evil" not in str(built.module.config.to_dict())  # type: ignore[operator,union-attr]


def test_weights_that_lack_a_tensor_are_refused_by_name(vit: tuple[Path, Any]) -> None:
    file = vit[0] / "model.safetensors"
    state = load_file(file)
    save_file({n: v for n, v in state.items() if not n.startswith("classifier")}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"lack 2 tensors of the network: classifier\.bias(.|\n)*features"):
        Transformers(path=str(vit[0])).build(None, 3)
    assert Transformers(path=str(vit[0]), task="features").build(None, 3)


def test_an_adapter_is_refused(vit: tuple[Path, Any]) -> None:
    (vit[0] / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"adapter(.|\n)*merge"):
        Transformers(path=str(vit[0])).build(None, 3)


@pytest.mark.parametrize(
    ("path", "revision", "named"),
    [
        ("google/vit", None, r"does not exist(.|\n)*hf://OWNER/NAME"),
        ("hf://a b", None, "names nothing on the Hub"),
        (".", "main", "leave `revision` out"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, revision: str | None, named: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=named):
        Transformers(path=path, revision=revision).build(None, 3)


def test_a_model_of_the_hub_is_read_from_its_cache(vit: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(vit[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert Transformers(path="hf://owner/name", revision="v1").build(None, 3)
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".py", ".bin", "*"))]


def test_a_model_that_cannot_be_downloaded_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LogitCacheError, match=r"could not be downloaded(.|\n)*HF_HOME"):
        Transformers(path="hf://owner/no-such-model").build(None, 3)


def test_without_the_extra_it_says_what_to_install(vit: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'logitcache\[hf\]'"):
        Transformers(path=str(vit[0])).build(None, 3)


def test_a_network_of_too_many_values_is_refused_before_it_is_built(vit: tuple[Path, Any], tmp_path: Path) -> None:
    built = Transformers(path=str(vit[0])).build(None, 3)
    assert built.preprocessing is not None
    settings = Transformers(path=str(vit[0])).architecture().config
    huge = TransformersNetwork(config={**settings, "hidden_size": 1 << 15, "intermediate_size": 1 << 17})
    (tmp_path / "run").mkdir()
    stored = StoredModel(model=huge, preprocessing=built.preprocessing, num_classes=3, in_channels=3)
    save_model(tmp_path / "run", built.module, stored)
    with pytest.raises(RecipeError, match="another network than weights"):
        load_model(tmp_path / "run")


def test_bicubic_stays_within_the_range_of_pixels(vit: tuple[Path, Any], tmp_path: Path) -> None:
    change_json(vit[0] / "preprocessor_config.json", resample=3, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    edges = torch.from_numpy(np.tile(np.array([0, 255], np.uint8).repeat(32), (2, 3, 64, 1)))
    found = classifier(vit[0]).normalize(edges)
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)
