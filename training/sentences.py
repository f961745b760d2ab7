"""Plain sentences, so that text without a question goes on in words: facts, scenes, beginnings with their ends."""

import random

from training.text_families import DAYS, MONTHS
from training.words import WORDS

CAPITALS = (
    ("France", "Paris"),
    ("Germany", "Berlin"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("China", "Beijing"),
    ("Japan", "Tokyo"),
    ("England", "London"),
    ("Russia", "Moscow"),
    ("Egypt", "Cairo"),
    ("Greece", "Athens"),
    ("Portugal", "Lisbon"),
    ("Austria", "Vienna"),
    ("Poland", "Warsaw"),
    ("Norway", "Oslo"),
    ("Sweden", "Stockholm"),
    ("Finland", "Helsinki"),
    ("Denmark", "Copenhagen"),
    ("Ireland", "Dublin"),
    ("Canada", "Ottawa"),
    ("Peru", "Lima"),
    ("Cuba", "Havana"),
    ("India", "New Delhi"),
    ("Turkey", "Ankara"),
    ("Iran", "Tehran"),
    ("Iraq", "Baghdad"),
    ("Kenya", "Nairobi"),
    ("Mexico", "Mexico City"),
    ("Argentina", "Buenos Aires"),
    ("Chile", "Santiago"),
    ("the United States", "Washington"),
    ("Hungary", "Budapest"),
    ("Belgium", "Brussels"),
    ("Thailand", "Bangkok"),
    ("South Korea", "Seoul"),
    ("Vietnam", "Hanoi"),
    ("Brazil", "Brasilia"),
    ("Australia", "Canberra"),
)
_NAMES = ("Anna", "Tom", "Lucy", "Ben", "Mia", "Paul", "Emma", "Jack", "Nina", "Leo", "Rosa", "Sam", "Kate", "Max")
_JOBS = ("teacher", "baker", "farmer", "doctor", "painter", "sailor", "student", "writer", "driver", "singer")
_PLACES = (
    "a small town",
    "the city",
    "a village by the sea",
    "the mountains",
    "an old house",
    "the south of France",
    "a quiet street",
    "London",
    "Berlin",
    "Beijing",
)
_LIKES = ("books", "music", "long walks", "cats", "numbers", "puzzles", "tea", "the sea", "old maps", "football")
# Beginning -> ends.
_FIXED = {
    "The president of the United States is": (
        " the head of state and of the government.",
        " elected every four years by the people.",
        " the head of the government and lives in the White House.",
    ),
    "The president of France is": (" the head of state and is elected every five years.",),
    "The future of AI is": (
        " in the hands of the people who build it.",
        " open, and we can all help to shape it.",
        " bright if we use it with care.",
    ),
    "The future of": (" the world is in our hands.", " music is full of new sounds.", " science is open."),
    "Once upon a time": (
        " there was a king who had three daughters.",
        " there lived an old man in a small house by the river.",
        " there was a little girl who liked to count the stars.",
    ),
    "The weather today is": (" warm and sunny, with a light wind.", " cold, and there will be rain in the evening."),
    "The sun": (" rises in the east and sets in the west.", " is a star, and the earth moves around it."),
    "Water": (" boils at 100 degrees and freezes at 0 degrees.", " is made of hydrogen and oxygen."),
    "The largest planet is": (" Jupiter.",),
    "The earth": (" goes around the sun in one year.", " is round and turns once a day."),
    "A week": (" has seven days.",),
    "A year": (" has twelve months, and most years have 365 days.",),
    "The meaning of life is": (" a question that everyone must answer alone.", " to learn and to be kind."),
    "In the beginning": (" there was only the dark water and the wind.",),
    "I think": (" we should go home before it gets dark.", " that you are right.", " it will rain tomorrow."),
    "DeepSeek-R1 is": (" a large language model that thinks before it answers.",),
    "Machine learning is": (" the study of programs that learn from examples.",),
    "The best way to learn is": (" to try, to fail and to try again.",),
    "My favourite color is": (" blue, like the sea in summer.", " green, like the grass in spring."),
    "The quick brown fox": (" jumps over the lazy dog.",),
}
_ZH = (
    "法国的首都是巴黎。",
    "中国的首都是北京。",
    "英国的首都是伦敦。",
    "一年有四个季节：春夏秋冬。",
    "一个星期有七天。",
    "太阳从东边出来。",
    "今天天气很好，我们去公园走走。",
    "我的名字叫小明，我是一名学生。",
    "她喜欢吃苹果，也喜欢看书。",
    "一年有十二个月，一天有二十四个小时。",
    "水是生命的源头。",
    "学习要一步一步来。",
    "我家有三口人：爸爸、妈妈和我。",
    "你好，我的名字是小红，我喜欢画画。",
)


def sentence(rng: random.Random) -> tuple[str, str]:
    """A beginning and the rest of a sentence; either may be most of it."""
    kind = rng.randrange(8)
    if kind == 0:
        country, capital = rng.choice(CAPITALS)
        ends = (f" {capital}.", f" {capital}, and it is a large city.", f" {capital}. Many people live there.")
        if country == "France":
            ends = (" Paris, a large city on the river Seine.", " Paris.", " Paris, and it is a large city.")
        return f"The capital of {country} is", rng.choice(ends)
    if kind == 1:
        name = rng.choice(_NAMES)
        ends = (
            f" {name}, and I live in {rng.choice(_PLACES)}.",
            f" {name} and I am a {rng.choice(_JOBS)}.",
            f" {name}. I like {rng.choice(_LIKES)} and {rng.choice(_LIKES)}.",
            f" {name}. I am {rng.randint(7, 70)} years old.",
        )
        return rng.choice(("Hello, my name is", "My name is", "Hi, my name is", "Hello! My name is")), rng.choice(ends)
    if kind in (2, 3):
        start = rng.choice(tuple(_FIXED))
        return start, rng.choice(_FIXED[start])
    if kind == 4:
        text = rng.choice(_ZH)
        cut = rng.randrange(1, len(text))
        return text[:cut], text[cut:]
    name, other = rng.sample(_NAMES, 2)
    if kind == 5:
        index = rng.randrange(7)
        day, following = DAYS["en"][index], DAYS["en"][(index + 1) % 7]
        month = rng.randrange(12)
        return rng.choice(
            (
                (f"The day after {day} is", f" {following}."),
                (f"The month after {MONTHS[month]} is", f" {MONTHS[(month + 1) % 12]}."),
                (f"On {day}", f" {name} went to {rng.choice(_PLACES)} with {other}."),
                (f"In {MONTHS[month]}", f" {name} and {other} moved to {rng.choice(_PLACES)}."),
            )
        )
    if kind == 6:
        return f"{name} is a {rng.choice(_JOBS)}", rng.choice(
            (
                f" who lives in {rng.choice(_PLACES)}.",
                f" and likes {rng.choice(_LIKES)} and {rng.choice(_LIKES)}.",
                f" from {rng.choice(CAPITALS)[1]}.",
                f". Every {rng.choice(DAYS['en'])} {name} meets {other}.",
            )
        )
    return rng.choice(
        (
            (f"{name} asked {other}", f" to bring the {rng.choice(WORDS)} and the {rng.choice(WORDS)}."),
            (f"There is a {rng.choice(WORDS)}", f" next to the {rng.choice(WORDS)} on the table."),
            (f"{name} and {other}", f" went to {rng.choice(_PLACES)} and talked about {rng.choice(_LIKES)}."),
            (f"Yesterday {name}", f" found a {rng.choice(WORDS)} and gave it to {other}."),
        )
    )


def paragraph(rng: random.Random) -> str:
    """Two to five sentences."""
    return " ".join("".join(sentence(rng)) for _ in range(rng.randint(2, 5)))
