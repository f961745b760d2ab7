"""How many prompt tokens a step may have, so that they do not hold the other requests for longer than they should."""

FIRST = 256  # tokens, before anything has been measured


class PromptPace:
    """seconds: that prompt tokens may add to a step.  least: tokens that a step may have in any case.

    The device is not known beforehand, nor what other programs leave of it, nor how long contexts are: what counts is
    how long the last steps took. The tokens of a step never change what is computed, only when.
    """

    def __init__(self, seconds: float, least: int = 1):
        self.seconds, self.least = seconds, least
        self.allowance = max(FIRST, least)
        self._streams = 0.0  # seconds of a step that only decodes

    def took(self, prompts: int, streams: int, seconds: float) -> None:
        """A step with so many prompt tokens and so many decoding requests took so long."""
        if not prompts:
            self._streams = seconds
            return
        added = max(seconds - self._streams, 1e-9) if streams else seconds
        if added > self.seconds:
            self.allowance = max(self.least, min(self.allowance, int(prompts * self.seconds / added)))
        elif 2 * prompts >= self.allowance:  # it was made use of
            self.allowance = int(self.allowance * min(2.0, self.seconds / added))


def least_chunk(latent: int, nope: int, rope: int, value: int) -> int:
    """Tokens of a prompt chunk below which a long context takes four times as long as the chunk itself.

    A chunk multiplies every latent of its context by kv_b_proj, latent * (nope + value) products a head, and each of
    its queries by every key and value, nope + rope + value products. 102 tokens for DeepSeek-R1.
    """
    return max(1, latent * (nope + value) // (nope + rope + value) // 4)
