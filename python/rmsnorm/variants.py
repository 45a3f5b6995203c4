"""Which options make rms_norm the RMSNorm of a model, by transformers' model_type.

The names are grouped by formula: T is the dtype of x, x32 = float32(x), and
r = 1/sqrt(mean(x32**2) + eps). Listed is the norm of a model's layers. Some models have further
norms beside it: gated ones in linear-attention and state-space blocks, unweighted ones on queries
and keys. A model made of others (a vision tower and any language model) is listed only if it has
norms of its own; those of its parts are under the types of the parts.
"""

from __future__ import annotations

import difflib
import re
from typing import TypedDict

from ._typing import Rounding


class Options(TypedDict, total=False):
    """The keyword arguments of rms_norm that tell the variants apart."""

    rounding: Rounding
    weight_offset: float


# w * T(x32 * r): rounded to T before the weight, which is multiplied in the dtype of w and T.
_ROUNDED_BEFORE_WEIGHT = """
    aimv2 aimv2_text_model aimv2_vision_model apertus apertus1p5 apertus1p5_text arcee aria
    aria_text axk1 axk2 bailing_hybrid bamba bitnet blt blt_global_transformer blt_local_decoder
    blt_local_encoder blt_patcher chameleon clvp clvp_encoder cohere2_moe cosmos3_edge
    cosmos3_edge_text cpmant csm csm_depth_decoder_model cwm deepseek_ocr2 deepseek_ocr2_encoder
    deepseek_ocr2_text deepseek_ocr2_vision deepseek_v2 deepseek_v3 deepseek_v32 deimv2 dia
    dia_decoder dia_encoder diffllama doge dots1 dots3_note dots3_note_audio_encoder
    dots3_note_text dots3_note_vision_encoder emu3 emu3_text_model ernie4_5 ernie4_5_moe
    ernie4_5_vl_moe ernie4_5_vl_moe_text eurobert evolla EvollaModel exaone exaone4 exaone4_5
    exaone4_5_vision exaone_moe falcon_h1 falcon_mamba glm glm4 glm4_moe glm4_moe_lite glm4v
    glm4v_moe glm4v_moe_text glm4v_moe_vision glm4v_text glm4v_vision glm5_next glm5_next_text
    glm5_next_vision glm_image glm_image_text glm_moe_dsa glm_ocr glm_ocr_text glm_ocr_vision
    granite granite4_vision granite4_vision_text granite_docling granite_docling_text
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared higgs_audio_v2
    hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hunyuan_vl_text hunyuan_vl_vision hy_v3 hy_v4
    hy_v4_vl hy_v4_vl_text hy_v4_vl_vision hyperclovax idefics2 idefics2_perceiver inkling_audio
    inkling_mm_model inkling_text inkling_vision internlm3 iquestcoder jamba jetmoe kimi_linear
    kolibri1 laguna lfm2 lfm2_moe lfm3 lfm3_vl lfm3_vl_vision lighton_ocr llama llama4
    llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2
    ministral ministral3 mistral mistral3 mistral4 mistral_large4 mistral_large4_text mixtral
    mllama mllama_text_model molmo2 molmo2_text muse_glimmer_assistant neucodec olmoe ovis2
    ovis2_vision paddleocr_vl paddleocr_vl_text pe_audio pe_audio_encoder pe_audio_video
    pe_audio_video_encoder pe_video pe_video_encoder phi3 phi4_multimodal pixtral qwen2
    qwen2_5_omni qwen2_5_omni_talker qwen2_5_omni_text qwen2_5_omni_thinker
    qwen2_5_omni_vision_encoder qwen2_5_vl qwen2_5_vl_text qwen2_5_vl_vision qwen2_moe qwen2_vl
    qwen2_vl_text qwen3 qwen3_moe qwen3_omni_moe qwen3_omni_moe_talker_code_predictor
    qwen3_omni_moe_talker_text qwen3_omni_moe_text qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe
    qwen3_vl_moe_text qwen3_vl_text sapiens2 sarvam_mla sarvam_moe seed_oss smollm3 solar_open
    timesfm timesfm2_5 ultrabert ultravbert unlimited_ocr unlimited_ocr_text vibevoice
    vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder
    vibevoice_acoustic_tokenizer_encoder vibevoice_asr voxtral_realtime voxtral_realtime_encoder
    voxtral_realtime_text xcodec2 xlstm youtu zamba zamba2 zaya
"""

# The same as long as w is in half precision like x. With w in float32 these models round nothing
# and give float32: rounding="once", out_dtype="float32".
_ROUNDED_TO_WEIGHT_DTYPE = """
    idefics kosmos_2_5_vision_model longt5 mt5 pix2struct pix2struct_text_model
    pix2struct_vision_model pop2piano switch_transformers t5 udop umt5
"""

# T(w * (x32 * r)): rounded once at the end, as torch.nn.functional.rms_norm does.
_ROUNDED_ONCE = """
    afmoe beam deepseek_v4 diffusion_gemma diffusion_gemma_text embedding_gemma2
    embedding_gemma2_text flex_olmo flint gemma3n gemma3n_audio gemma3n_text gemma4 gemma4_audio
    gemma4_text gemma4_unified gemma4_unified_text gemma4_vision gpt_oss helium inkling2
    inkling2_loop inkling2_loop_text inkling2_text kyutai_speech_to_text lara_mini moshi
    moshi_depth muse_spark_audio nemotron_h nemotron_h_omni olmo2 olmo3 olmo_hybrid
    openai_privacy_filter
"""

# T(x32 * r), no weight.
_UNWEIGHTED = """
    esmfold2 hrm_text nanochat neomme
"""

# T(x32 * r * (1 + w)): weights stored around zero.
_WEIGHT_AROUND_ZERO = """
    gemma gemma2 gemma3 gemma3_text minimax_m3_vl minimax_m3_vl_text muse_glimmer
    muse_glimmer_text qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next
    recurrent_gemma step3p5 step3p7 t5_gemma_module t5gemma t5gemma2 t5gemma2_decoder
    t5gemma2_encoder t5gemma2_text vaultgemma
"""

_VARIANTS: dict[str, Options] = {
    **dict.fromkeys(_ROUNDED_BEFORE_WEIGHT.split(), Options(rounding="before_weight")),
    **dict.fromkeys(_ROUNDED_TO_WEIGHT_DTYPE.split(), Options(rounding="before_weight")),
    **dict.fromkeys(_ROUNDED_ONCE.split(), Options(rounding="once")),
    **dict.fromkeys(_UNWEIGHTED.split(), Options(rounding="once")),
    **dict.fromkeys(_WEIGHT_AROUND_ZERO.split(), Options(rounding="once", weight_offset=1.0)),
}


# The names by their letters and digits: repositories and classes separate them in other ways.
_BY_LETTERS = {re.sub(r"[\W_]", "", name).lower(): name for name in _VARIANTS}


def _similar(name: str) -> list[str]:
    """The names that are meant by a mistyped one, a class, a repository or a path, as it seems."""
    file = re.split(r"[/\\]", name[-100:].lower().rstrip("/\\"))[-1]
    words = re.findall(r"[^\W_]+", file)
    rests = ["".join(words[i:]) for i in range(len(words))]
    starts = {start for start in _BY_LETTERS for rest in rests if rest.startswith(start)}
    found = sorted(starts, key=len, reverse=True)
    for text in (*rests[:1], *words):
        found += difflib.get_close_matches(text, _BY_LETTERS)
    return [_BY_LETTERS[letters] for letters in dict.fromkeys(found)][:4]


def _unknown(name: str) -> str:
    shown = repr(name[:80])[:80] + ("" if len(name) <= 80 else f"... ({len(name)} characters)")
    similar = ", ".join(_similar(name))
    return (
        "name: expected a model_type of transformers whose RMSNorm is known, as in config.json and "
        "model.config.model_type (or its text_config's, if a model is made of others), "
        f"got {shown}" + (f"; similar: {similar}" if similar else "")
    )


def variant(name: str) -> Options:
    """Keyword arguments that make rms_norm compute the RMSNorm of a model.

    ``rms_norm(x, weight, eps=config.rms_norm_eps, **variant(config.model_type))``

    The options never contain eps, which is the checkpoint's, nor the weight. What they are for is
    the norm of the model's layers; norms that need a gate or groups are not covered.

    T5 and its relatives (mt5, umt5, longt5, ...) round by the dtype of the weight. The options are
    for weights in half precision, or for float32 throughout. With half x and float32 weights, pass
    ``rounding="once", out_dtype="float32"`` instead.

    Where a float32 weight meets half x in the models that round before the weight (Llama and most
    others), the model's own result is float32; pass ``out_dtype="float32"`` for the same.

    Args:
        name: A model_type of transformers, as in config.json and ``model.config.model_type``:
            "llama", "gemma2". All of transformers 5.24.0 are known whose norm is one of rms_norm's.
            Types of models that are made of others, such as "llava", are not: the types of those
            others are, such as ``model.config.text_config.model_type``.

    Returns:
        A new dictionary.

    Raises:
        TypeError: name is not a string.
        ValueError: The name is not known, or its norm cannot be had by the options of rms_norm; the
            message lists similar names that can. The name of a repository or a class is not a
            model_type; the message lists those that it resembles.

    Examples:
        >>> import rmsnorm
        >>> rmsnorm.variant("gemma2")
        {'rounding': 'once', 'weight_offset': 1.0}
    """
    if not issubclass(type(name), str):
        kind = type(name).__name__[:80]
        raise TypeError(f"name: expected a string such as config.model_type, got {kind}")
    name = str.__str__(name)  # A class derived from str may answer anything else.
    options = _VARIANTS.get(name)
    if options is None:
        raise ValueError(_unknown(name))
    return options.copy()
