"""Words to spell, and invented ones, so that letters are learned and not words."""

import random

WORDS = tuple(
    """
apple banana cherry orange lemon melon strawberry raspberry blueberry grape peach pear mango papaya coconut tomato
potato carrot onion pepper garlic cabbage pumpkin mushroom bread butter cheese honey sugar coffee chocolate sandwich
water river ocean mountain valley forest desert island meadow garden flower tree branch leaf root seed grass stone
house window kitchen bedroom ceiling carpet mirror candle lamp table chair shelf drawer blanket pillow towel basket
school teacher student lesson pencil paper notebook library dictionary history science language grammar sentence letter
computer keyboard screen memory network program software hardware internet message number system machine engine robot
doctor nurse farmer baker driver pilot sailor soldier painter singer dancer writer reader lawyer engineer president
summer winter spring autumn january february march april may june july august september october november december
monday tuesday wednesday thursday friday saturday sunday morning evening night yesterday tomorrow today minute second
red green blue yellow purple orange brown black white silver golden happy angry tired hungry thirsty sleepy lonely brave
elephant giraffe tiger lion monkey kangaroo rabbit squirrel horse donkey chicken goose duck turkey dolphin whale shark
spider butterfly mosquito beetle snail turtle crocodile lizard penguin parrot sparrow eagle pigeon raven owl bee ant cat
dog mouse cow sheep goat pig wolf bear fox deer frog fish bird snake camel zebra panda koala otter beaver hamster
balloon bottle button cotton ladder letter mirror hammer rubber rabbit coffee toffee bubble pebble puzzle middle little
apartment beginning business committee community different difficult education embarrass environment experience
government important information interesting knowledge mathematics millennium mississippi necessary occurrence
opportunity parallel particular population possible possession programming quantization queue restaurant rhythm
successful temperature tennessee tomorrow transformer tree understand university vegetable weather yellow zoo hello
world deepseek reason model token expert attention strawberries bookkeeper banana's assessment addresses process
street bridge tunnel station airport harbour market theatre museum hospital castle village country border journey
""".replace("'s", "").split()
)
_ONSETS = ("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "st", "tr",
           "pl", "gr", "sh", "ch", "th", "sp", "qu", "cr", "fl")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ee", "oo", "ea", "ai", "y")
_CODAS = ("", "", "n", "r", "s", "t", "l", "m", "ll", "ss", "rr", "ck", "nd", "tt", "x", "pp")


def invented(rng: random.Random, longest: int) -> str:
    """A pronounceable word that probably does not exist, of 3 to `longest` letters."""
    word = ""
    for _ in range(rng.randint(1, 4)):
        word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
    return word[:longest] if len(word) >= 3 else word + "ana"


def word(rng: random.Random, longest: int = 12) -> str:
    """A real word, an invented one, or a few letters."""
    kind = rng.random()
    if kind < 0.4:
        chosen = rng.choice(WORDS)
        return chosen if len(chosen) <= longest else chosen[:longest]
    if kind < 0.85:
        return invented(rng, longest)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 8)))
