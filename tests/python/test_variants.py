"""variant() against every model type of one version of transformers.

The norm of a type is derived and not looked up: its model is built without storage from the default
config, and replace_rms_norms says what each of its norms computes. variant() must know the types
whose layers have a norm that rms_norm covers, with the options of that norm, and no others.
"""

import collections
import functools
import importlib
import inspect
import pathlib
import re
import sys

import pytest
import rmsnorm
import torch
from formulas import OPTIONS
from rmsnorm.torch import replace_rms_norms

transformers = pytest.importorskip("transformers")

VERSION = "5.24.0"
if transformers.__version__ != VERSION:
    pytest.skip(
        f"variant() has the names of transformers {VERSION}, not {transformers.__version__}",
        allow_module_level=True,
    )

from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

# What replace_rms_norms calls the formulas of formulas.py.
LETTERS = {
    "w * T(x32 * r)": "A",
    "w * T(x32 * r) + b": "M",
    "T(x32 * r * (1 + w))": "B",
    "T(w * (x32 * r))": "C",
    "w * W(x32 * r), W being the dtype of w if that is half precision, else float32": "D",
    "T(x32 * r)": "F",
    "x * T(r)": "G",
}

# Types whose layers have a norm that rms_norm does not cover, and what it does instead.
LEFT_OUT = {
    "cohere": "the mean is subtracted",
    "cohere2": "the mean is subtracted",
    "cohere_compass": "the mean is subtracted",
    "cohere_compass_text": "the mean is subtracted",
    "deberta": "the mean is subtracted",
    "dory": "the squares are summed and not averaged",
    "imagegpt": "the mean is taken in the dtype of x",
    "muse_spark": "1 is added to the weight in the dtype of the weight",
    "muse_spark_text": "1 is added to the weight in the dtype of the weight",
    "phi4_multimodal_audio": "the statistics are stored ones",
    "qwen4_exp": "the mean is taken over groups",
    "qwen4_exp_text": "the mean is taken over groups",
    "rt_detr": "the statistics are stored ones",
}

# Types whose model cannot be built here, from files without an RMSNorm.
UNBUILT = {
    "dinat": "wants natten",
    "edgetam": "wants timm",
    "edgetam_vision_model": "wants timm",
    "higgs_audio_v2_tokenizer": "wants torchaudio",
    "nougat": "has no default config",
    "perception_lm": "wants timm",
}

# A part without a model of its own, and the type of the model that it is a part of.
PARTS = {"t5_gemma_module": "t5gemma"}


@functools.cache
def arguments():
    """Arguments of configs without which their model cannot be built, or has no RMSNorm."""
    video = transformers.PeVideoEncoderConfig(vision_config=transformers.ViTConfig())
    audio_video = transformers.PeAudioVideoEncoderConfig(video_config=video)
    sliding = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    return {
        "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGA": 4}},
        "cohere2_moe": {"rms_norm_eps": 1e-6},
        "cohere_compass_text": {
            "layer_types": ["sliding_attention"] * 2,
            "num_hidden_layers": 2,
            "rope_parameters": sliding,
        },
        "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] * 2, "num_hidden_layers": 2},
        "diffusion_gemma_text": {"num_experts": 2, "moe_intermediate_size": 8},
        "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
        "esm": {"vocab_size": 8},
        "gemma4_assistant": {
            "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        },
        "hunyuan_v1_dense": {"head_dim": 16},
        "hunyuan_v1_moe": {"head_dim": 16},
        "hunyuan_vl_text": {"head_dim": 16},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
        "ministral": {"head_dim": 16},
        "moonshine_streaming": {"num_key_value_heads": 8},
        "nemotron": {"num_key_value_heads": 1},
        "pe_audio_video": {"audio_video_config": audio_video},
        "pe_audio_video_encoder": {"video_config": video},
        "pe_video": {"video_config": video},
        "pe_video_encoder": {"vision_config": transformers.ViTConfig()},
        "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 8},
        "qwen4_exp_text": {
            "indexer_n_heads": 1,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 8,
            "indexer_compress_ratio": 1,
        },
        "t5gemma2_text": {"dropout_rate": 0.0},
        "t5gemma2_decoder": {"dropout_rate": 0.0},
    }


def below(kind):
    for derived in kind.__subclasses__():
        yield derived
        yield from below(derived)


def package(kind):
    """llama of transformers.models.llama.modeling_llama; None for a class that is elsewhere."""
    module = kind.__module__.split(".")
    return module[2] if module[:2] == ["transformers", "models"] else None


@functools.cache
def import_all_models():
    for path in pathlib.Path(transformers.__file__).parent.glob("models/*/*.py"):
        if path.name.startswith(("configuration_", "modeling_")):
            try:
                importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            except ImportError as error:  # of a package that this model alone wants
                assert path.stem == "modeling_higgs_audio_v2_tokenizer", error


@functools.cache
def config_classes():
    """Those of every model type: of CONFIG_MAPPING, and of the parts that models have."""
    import_all_models()
    types = collections.defaultdict(set)
    for name in transformers.CONFIG_MAPPING:
        types[name].add(transformers.CONFIG_MAPPING[name])
    for kind in filter(package, below(transformers.PreTrainedConfig)):
        types[kind.model_type].add(kind)
    del types[""]
    return types


@functools.cache
def models_by_config():
    models = collections.defaultdict(set)
    for kind in filter(package, below(transformers.PreTrainedModel)):
        if "forward" in vars(kind):
            models[kind.config_class].add(kind)
    return models


def model_classes(config):
    """Base models first, which are built faster."""
    mapped = modeling_auto.MODEL_MAPPING_NAMES.get(config.model_type, ())
    names = [mapped] if isinstance(mapped, str) else mapped
    others = sorted(
        models_by_config()[type(config)], key=lambda m: ("For" in m.__name__, m.__name__)
    )
    named = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return named + others


@functools.cache
def may_normalize(module):
    """False if the file has nothing to take the root of a mean square with."""
    return re.search(
        r"rms_?norm|rsqrt|square|pow\(2\)", inspect.getsource(sys.modules[module]), re.IGNORECASE
    )


class Unbuildable(Exception):
    pass


def build(config):
    """A model of the config, whichever can be built; None if it has no use for this library."""
    classes = model_classes(config)
    if not any(may_normalize(kind.__module__) for kind in classes):
        return None
    errors = []
    for kind in classes:
        try:
            with torch.device("meta"), no_init_weights():
                return kind(config)
        # Default configs lack what models need, in as many ways as there are such models.
        except Exception as error:  # noqa: BLE001
            errors.append(f"{kind.__name__}: {error!r}")
    raise Unbuildable("; ".join(errors))


def of_another_type(model, name, own):
    """Whether a module is in a model within, whose config is that of another type."""
    parts = name.split(".")
    within = (model.get_submodule(".".join(parts[:i])) for i in reversed(range(len(parts))))
    owner = next(m for m in within if isinstance(m, transformers.PreTrainedModel))
    return package(type(owner.config)) != own


_computed = {}


def what_it_computes(norm):
    """Its formula or why it has none that is known; None if it normalizes no tensor that it is given.
    Looked at once for all norms of a class, since neither sizes nor eps change the formula."""
    attributes = ((k, v if isinstance(v, bool) else type(v)) for k, v in vars(norm).items())
    parameters = ((k, p is None) for k, p in norm._parameters.items())
    kind = (type(norm), *attributes, *parameters)
    if kind not in _computed:
        with replace_rms_norms(norm) as report:
            found = [n.formula for n in report.replaced if n.module is norm]
            found += [n.reason for n in report.left if n.module is norm]
        weights = type(norm).__module__.startswith("torch.nn.utils")  # a parametrization of them
        _computed[kind] = None if weights else next(iter(found), None)
    return _computed[kind]


def formula_of_layers(model, own):
    """What most of the norms compute; those without a weight count where there are no others."""
    counts = collections.Counter()
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and not of_another_type(model, name, own):
            weighted = any(p is not None for p in module._parameters.values())
            counts[weighted, what_it_computes(module)] += 1
    found = [kind for kind in counts if kind[1] is not None]
    return max(found, key=lambda kind: (kind[0], counts[kind]))[1] if found else None


def text_part(config):
    """Of a config made of parts, that of the layers which write text, or else read it."""
    try:
        return config.get_text_config()
    except ValueError:  # there are both
        return config.get_text_config(decoder=True)


@functools.cache
def formula(config_class):
    """Of the norms in the layers of a type; None if they are not its own or it has none."""
    config = config_class(**arguments().get(config_class.model_type, {}))
    text = text_part(config)
    own = package(config_class)
    if text is not config and package(type(text)) == own and model_classes(text):
        return formula(type(text))
    model = build(config)
    return None if model is None else formula_of_layers(model, own)


@pytest.fixture(scope="module")
def derived():
    """The formulas by model type, and the types whose formula cannot be found out."""
    formulas, unknown = {}, {}
    for name in config_classes():
        try:
            # Where a class was renamed, transformers has no model for the old one.
            found = {formula(kind) for kind in config_classes()[PARTS.get(name, name)]} - {None}
        except Exception as error:  # noqa: BLE001  to list them all
            unknown[name] = repr(error)[:300]
            continue
        assert len(found) <= 1, (name, found)
        formulas.update(dict.fromkeys([name] if found else [], *found))
    return formulas, unknown


def known_options(name):
    try:
        return rmsnorm.variant(name)
    except ValueError:
        return None


def test_options_of_every_model_type(derived):
    formulas, _ = derived
    expected = {name: OPTIONS[LETTERS[f]] for name, f in formulas.items() if f in LETTERS}
    known = {name: known_options(name) for name in {*expected, *config_classes()}}
    missing = sorted(name for name in expected if known[name] is None)
    assert not missing, f"missing from variants.py: {missing}"
    too_many = sorted(name for name in known if known[name] and name not in expected)
    assert not too_many, f"in variants.py, without such a norm: {too_many}"
    wrong = {n: (known[n], options) for n, options in expected.items() if known[n] != options}
    assert not wrong, f"in variants.py, and right: {wrong}"
    assert len(expected) > 250


def test_what_is_left_out(derived):
    formulas, _ = derived
    left_out = {name: f for name, f in formulas.items() if f not in LETTERS}
    assert left_out.keys() == LEFT_OUT.keys(), left_out


def test_every_model_can_be_built(derived):
    _, unknown = derived
    assert unknown.keys() <= UNBUILT.keys(), unknown


def test_variant_knows_no_type_that_there_is_not():
    assert set(rmsnorm.variants._VARIANTS) <= config_classes().keys()
