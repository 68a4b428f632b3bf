"""Filling split experts from a checkpoint that holds them fused, through transformers' own conversions.

Whatever transformers would do to make the fused parameter of a layer (rename, transpose, join, de-interleave) is done,
and its result handed out to the experts' linear modules. So one layer's fused parameter at a time is in full precision.
"""

from typing import Any, Self

from transformers.core_model_loading import ConversionOps, WeightConverter

from moe.split_experts import PerExpertLinears, fused_names, has_bias, is_transposed, merges_experts


def splitting_conversions(conversions: list[Any], experts: PerExpertLinears) -> list[Any]:
    """Return the conversions to load split experts with, all layers being like `experts`.

    A checkpoint that holds them one by one needs none, and what would merge them is left out; another gets ours.
    """
    kept = [each for each in conversions if not merges_experts(each)]
    if experts.split.stored_singly:
        return kept
    fused = experts.__dict__["fused"]
    for name in fused_names(fused):
        for each in conversions:
            if merges_experts(each) and each._original_target_patterns[0].endswith(f".{name}"):
                prefix = each._original_target_patterns[0].removesuffix(name)
                handing_out = _HandOut(name, f"{name}.weight", each)
                kept.append(
                    each.copy(each._original_source_patterns, f"{prefix}0.{name}.weight", operations=[handing_out])
                )
        # The names of the fused parameters themselves, which renamings may have led to; tried last.
        kept.append(_plain(name, f"{name}.weight"))
        if has_bias(fused):
            kept.append(_plain(f"{name}_bias", f"{name}.bias"))
    return kept


def without_splitting(conversions: list[Any]) -> list[Any]:
    """Return the conversions that are undone on saving: split experts are saved as they are."""
    return [each for each in conversions if not any(isinstance(op, _HandOut) for op in getattr(each, "operations", ()))]


def _plain(fused_name: str, split_name: str) -> WeightConverter:
    return WeightConverter(
        rf"\.experts\.{fused_name}", f".experts.0.{split_name}", operations=[_HandOut(fused_name, split_name, None)]
    )


class _HandOut(ConversionOps):
    """Does what `filling` does to make the fused parameter, and gives each expert its share of it."""

    def __init__(self, fused_name: str, split_name: str, filling: Any) -> None:
        self._fused_name, self._split_name, self._filling = fused_name, split_name, filling

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # transformers copies a converter for every parameter; this one has no state

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        place, _, _ = str(kwargs.pop("full_layer_name")).partition(".experts.")
        fused: Any = kwargs.pop("model").get_submodule(f"{place}.experts").__dict__["fused"]
        for operation in self._filling.operations if self._filling else ():
            input_dict = operation.convert(
                input_dict,
                source_patterns=source_patterns,
                target_patterns=[self._fused_name],
                full_layer_name=self._fused_name,
                model=fused,
                **kwargs,
            )
        (stacked,) = input_dict.values()
        stacked = stacked[0] if isinstance(stacked, list) else stacked
        if stacked.shape != getattr(fused, self._fused_name).shape:
            raise ValueError(
                f"{place}.experts.{self._fused_name} is {tuple(stacked.shape)}, and the configuration says "
                f"{tuple(getattr(fused, self._fused_name).shape)}"
            )
        if stacked.dim() == 3 and is_transposed(fused):
            stacked = stacked.transpose(1, 2)
        first = target_patterns[0]
        # Cloned where small, so that what is saved shares no memory; matrices are about to be quantised.
        return {
            first.replace(f"0.{self._split_name}", f"{expert}.{self._split_name}"): (
                share.clone() if share.dim() == 1 else share.contiguous()
            )
            for expert, share in enumerate(stacked)
        }
