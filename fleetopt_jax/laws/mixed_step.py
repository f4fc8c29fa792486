"""One iteration of an engine: sequences that decode, and prompt tokens beside them."""

from jax import Array

from fleetopt_jax.core.struct import pytree


@pytree
class StepBatch:
    """What one iteration works on. Every field is traced; shape () or a leading vmap axis."""

    n_active: Array  # sequences that decode, a token each [-]
    tokens: Array  # their contexts, summed [tokens]
    windowed_tokens: Array  # the same, each cut to the sliding window [tokens]
    prompt_tokens: Array  # tokens of prompts [tokens]
    prompt_pairs: Array  # (token, token it attends to) of those, with the part of the prompt done before [tokens^2]
    windowed_pairs: Array  # the same in layers with a sliding window [tokens^2]
