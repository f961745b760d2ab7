"""Speculative decoding."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from deepseek_fp4_plugin.settings.choices import ANY, Bool, Choices, Count, Int, Real


class SpeculativeConfig(Choices):
    """Speculative decoding with the checkpoint's multi-token-prediction (MTP) layer.

    num_nextn_predict_layers: drafts a step, all from the one MTP layer.  Relaxed acceptance: inside the thinking phase
    a draft also passes when it is among the relaxed_topk most probable tokens and its probability is at least the
    highest minus relaxed_delta; the output is then no longer exactly the target model's.
    """

    decoding_type: Literal["MTP"] = "MTP"
    num_nextn_predict_layers: Annotated[Int, Field(ge=1, le=64)] = 1
    use_relaxed_acceptance_for_thinking: Bool = False
    relaxed_topk: Count = 1
    relaxed_delta: Annotated[Real, Field(ge=0)] = 0.0

    aliases: ClassVar[Mapping[str, str]] = {"max_draft_len": "num_nextn_predict_layers"}
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_mtp_vanilla": (False,),
        "mtp_eagle_one_model": (ANY,),
        "speculative_model": (),
    }

    def __init__(self, **values: Any):
        if isinstance(values.get("decoding_type"), str):
            values["decoding_type"] = values["decoding_type"].upper()
        super().__init__(**values)
