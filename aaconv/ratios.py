"""Compute dk and dv from fractions of the output channels (kappa and upsilon in the paper)."""

# Upper limits of dk and dv as fractions of a layer's output channels. The paper's largest kappa is
# 1; the dv channels are part of the output.
MAX_FRACTION = {"dk": 2, "dv": 1}


def channels(amount: int | float, out_channels: int, Nh: int, min_per_head: int = 1) -> int:
    """Return the number of channels that ``amount`` means for ``out_channels`` and Nh heads.

    An int is a number of channels, used as is. A float is a fraction of ``out_channels``, rounded
    to a multiple of Nh, with at least ``min_per_head`` channels for each head (20 for the keys of
    the paper's ImageNet networks, section 4.2).
    """
    if isinstance(amount, int):
        return amount
    return Nh * max(min_per_head, round(amount * out_channels / Nh))


def check_amount(name: str, amount: int | float) -> None:
    """Raise ValueError unless ``amount``, channels or a fraction, is plausible as dk or dv.

    An int is a number of channels and a float is a fraction. If the value looks as if the other
    one was meant, the message says how to write that. ``name`` is the user's name for the setting
    and ends in ``dk`` or ``dv``.
    """
    most = MAX_FRACTION[name[-2:]]
    if isinstance(amount, int):
        if 1 <= amount <= most:
            raise ValueError(
                f"{name}={amount} means {amount} of the channels; write {amount}.0 for {amount} "
                "times the layer's output, or a small fraction to use only so few"
            )
        return
    if not 0 < amount <= most:
        instead = f"{amount:.0f}" if most < amount < 1e9 else "an int such as 16"
        raise ValueError(
            f"{name}={amount} is a fraction of the layer's output, which must be above 0 "
            f"and at most {most}; write {instead} for channels"
        )
