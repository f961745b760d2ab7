"""Families about numbers: add and subtract, multiply, compare, sort, sequences."""

import random
from itertools import pairwise

from training.arithmetic import PLACES, minus, plus, times
from training.exercise import Exercise


def number(rng: random.Random, longest: int = 3) -> int:
    """One to `longest` digits, longer ones more often."""
    length = rng.choices(range(1, longest + 1), weights=range(1, longest + 1))[0]
    return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)


def _say(rng: random.Random, language: str, phrases: dict[str, tuple[str, ...]], *values: object) -> str:
    return rng.choice(phrases[language]).format(*values)


_ADD = {
    "en": (
        "What is {0} + {1}?",
        "What is {0}+{1}?",
        "Calculate {0} + {1}.",
        "Compute {0} + {1}.",
        "{0} + {1} = ?",
        "Add {0} and {1}.",
        "What is {0} plus {1}?",
        "What is the sum of {0} and {1}?",
        "How much is {0} + {1}?",
        "{0}+{1}",
        "Please add {1} to {0}.",
        "Find {0} + {1}.",
        "Can you work out {0} plus {1}?",
        "{0} + {1}",
        "{0}+{1}=?",
        "{0} plus {1}",
        "{0} + {1} =",
        "{0}+{1}=",
        "Solve {0} + {1}.",
        "Tell me {0} + {1}.",
        "what's {0} + {1}?",
    ),
    "zh": (
        "{0} + {1} 等于多少？",
        "{0}加{1}等于多少？",
        "计算{0}+{1}。",
        "请计算 {0} + {1}。",
        "{0}与{1}的和是多少？",
        "{0}+{1}=？",
        "{0}+{1}是多少？",
    ),
}
_SUBTRACT = {
    "en": (
        "What is {0} - {1}?",
        "What is {0}-{1}?",
        "Calculate {0} - {1}.",
        "Compute {0} - {1}.",
        "{0} - {1} = ?",
        "Subtract {1} from {0}.",
        "What is {0} minus {1}?",
        "What is the difference {0} - {1}?",
        "How much is {0} - {1}?",
        "{0}-{1}",
        "Take {1} away from {0}.",
        "Find {0} - {1}.",
        "Can you work out {0} minus {1}?",
        "{0} - {1}",
        "{0}-{1}=?",
        "{0} minus {1}",
        "{0} - {1} =",
        "{0}-{1}=",
        "Solve {0} - {1}.",
        "what's {0} - {1}?",
    ),
    "zh": (
        "{0} - {1} 等于多少？",
        "{0}减{1}等于多少？",
        "计算{0}-{1}。",
        "请计算 {0} - {1}。",
        "{0}减去{1}是多少？",
        "{0}-{1}=？",
        "{0}-{1}是多少？",
    ),
}


def add_subtract(rng: random.Random, language: str) -> Exercise:
    longest = 4 if rng.random() < 0.08 else 3
    a, b = number(rng, longest), number(rng, longest)
    if rng.random() < 0.5:
        return Exercise(f"{min(a, b)}+{max(a, b)}", _say(rng, language, _ADD, a, b), plus(a, b, language), str(a + b))
    if a < b and rng.random() < 0.7:
        a, b = b, a
    reasoning = ""
    if a != b and min(a, b) >= 10 and len(str(a)) == len(str(b)) and str(a)[0] == str(b)[0]:
        reasoning = _comparison(str(a), str(b), language)  # too close to tell at a glance
        reasoning += f"{a}>{b}\n" if a > b else ""
    if a >= b:
        reasoning += minus(a, b, language)
    elif language == "en":
        reasoning += f"{a}<{b}, so the result is negative: {minus(b, a, language)}\n{a}-{b}=-{b - a}"
    else:
        reasoning += f"{a}<{b}，结果小于零：{minus(b, a, language)}\n{a}-{b}=-{b - a}"
    return Exercise(f"{a}-{b}", _say(rng, language, _SUBTRACT, a, b), reasoning, str(a - b))


_MULTIPLY = {
    "en": (
        "What is {0} * {1}?",
        "What is {0} × {1}?",
        "What is {0} x {1}?",
        "What is {0}*{1}?",
        "Calculate {0} × {1}.",
        "Compute {0} * {1}.",
        "{0} × {1} = ?",
        "Multiply {0} by {1}.",
        "What is {0} times {1}?",
        "{0} * {1}",
        "What is the product of {0} and {1}?",
        "How much is {0} times {1}?",
        "{0}×{1}",
        "{0}*{1}=?",
        "{0} * {1} =",
        "{0}*{1}=",
        "Find {0} × {1}.",
        "Can you work out {0} times {1}?",
        "{0} times {1}",
        "what's {0} * {1}?",
    ),
    "zh": (
        "{0} × {1} 等于多少？",
        "{0}乘以{1}等于多少？",
        "计算{0}×{1}。",
        "请计算 {0} × {1}。",
        "{0}与{1}的积是多少？",
        "{0}×{1}=？",
        "{0}乘{1}是多少？",
    ),
}


def multiply(rng: random.Random, language: str) -> Exercise:
    kind = rng.choices(("1x1", "2x1", "3x1", "2x2"), weights=(1, 2, 2, 3))[0]
    a = rng.randrange(*{"1": (0, 10), "2": (10, 100), "3": (100, 1000)}[kind[0]])
    b = rng.randrange(*{"1": (0, 10), "2": (10, 100)}[kind[2]])
    if rng.random() < 0.3 and a < 100:
        a, b = b, a
    prompt = _say(rng, language, _MULTIPLY, a, b)
    return Exercise(f"{min(a, b)}x{max(a, b)}", prompt, times(a, b, language), str(a * b))


_COMPARE = {
    "larger": {
        "en": (
            "Which is larger, {0} or {1}?",
            "Which number is bigger: {0} or {1}?",
            "Which is greater, {0} or {1}?",
            "Compare {0} and {1}. Which is larger?",
            "What is the larger of {0} and {1}?",
            "Is {0} or {1} bigger?",
            "Which one is bigger, {0} or {1}?",
            "What is the maximum of {0} and {1}?",
        ),
        "zh": ("{0}和{1}哪个大？", "{0}和{1}，哪个更大？", "比较{0}和{1}，哪个数大？", "{0}与{1}中更大的是哪个？"),
    },
    "smaller": {
        "en": (
            "Which is smaller, {0} or {1}?",
            "Which number is less: {0} or {1}?",
            "Compare {0} and {1}. Which is smaller?",
            "What is the smaller of {0} and {1}?",
            "Which one is smaller, {0} or {1}?",
            "What is the minimum of {0} and {1}?",
        ),
        "zh": ("{0}和{1}哪个小？", "{0}和{1}，哪个更小？", "比较{0}和{1}，哪个数小？"),
    },
    "yes": {
        "en": (
            "Is {0} greater than {1}?",
            "Is {0} larger than {1}?",
            "Is {0} bigger than {1}?",
            "Is {0} > {1}?",
            "Is {0} more than {1}?",
        ),
        "zh": ("{0}比{1}大吗？", "{0}大于{1}吗？"),
    },
    "sign": {
        "en": (
            "Fill in <, > or =: {0} _ {1}",
            "Which sign goes between {0} and {1}: <, > or =?",
            "Put <, > or = between {0} and {1}.",
        ),
        "zh": ("在{0}和{1}中间填<、>或=。", "{0}和{1}，填<、>或=。"),
    },
}


def compare(rng: random.Random, language: str) -> Exercise:
    if rng.random() < 0.12:
        return _extreme(rng, language)
    a, b = _pair(rng)
    while float(a) == float(b) and rng.random() < 0.9:
        a, b = _pair(rng)
    sign = "<" if float(a) < float(b) else ">" if float(a) > float(b) else "="
    kind = rng.choice(("yes", "sign")) if sign == "=" else rng.choices(tuple(_COMPARE), weights=(4, 3, 1, 1))[0]
    reasoning = _comparison(a, b, language) + f"{a}{sign}{b}"
    if kind in ("larger", "smaller"):
        answer = a if (sign == ">") == (kind == "larger") else b
    elif kind == "sign":
        answer = sign
    else:
        answer = {"en": ("no", "yes"), "zh": ("不是", "是")}[language][sign == ">"]
    return Exercise(",".join(sorted((a, b))), _say(rng, language, _COMPARE[kind], a, b), reasoning, answer)


_EXTREME = {
    "en": (
        (
            "What is the biggest of {0}?",
            "Which is the largest: {0}?",
            "Find the largest number: {0}",
            "What is the maximum of {0}?",
            "Which number is the greatest, {0}?",
        ),
        (
            "What is the smallest of {0}?",
            "Which is the smallest: {0}?",
            "Find the smallest number: {0}",
            "What is the minimum of {0}?",
        ),
    ),
    "zh": (
        ("{0}中最大的是哪个？", "{0}里最大的数是多少？"),
        ("{0}中最小的是哪个？", "{0}里最小的数是多少？"),
    ),
}


def _extreme(rng: random.Random, language: str) -> Exercise:
    """The largest or smallest of three to five numbers, one look at each."""
    values = rng.sample(range(rng.choice((10, 100, 100, 1000))), rng.randint(3, 5))
    large = rng.random() < 0.6
    best, steps = values[0], [str(values[0])]
    for value in values[1:]:
        steps.append(f"{value}{'>' if value > best else '<'}{best}")
        best = max(best, value) if large else min(best, value)
    last = {"en": " and ", "zh": "和"}[language] if rng.random() < 0.5 else ", "
    listing = ", ".join(map(str, values[:-1])) + last + str(values[-1])
    prompt = rng.choice(_EXTREME[language][not large]).format(listing)
    reasoning = "; ".join(steps) + ("; so " if language == "en" else "；所以") + str(best)
    return Exercise(",".join(map(str, sorted(values))), prompt, reasoning, str(best))


def _pair(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.6:
        length = rng.choice((1, 2, 2, 3, 3, 4))
        a = rng.randrange(10 ** (length - 1), 10**length)
        if rng.random() < 0.25:
            return str(a), str(number(rng, 4))
        b = list(str(a))  # same beginning, so that digits must be looked at one by one
        for i in range(rng.randrange(length), length):
            b[i] = str(rng.randrange(1 if i == 0 else 0, 10))
        return str(a), "".join(b)
    whole = rng.randrange(0, 30)
    other = whole if rng.random() < 0.8 else rng.randrange(0, 30)

    def decimal(part: int) -> str:
        return f"{part}.{rng.randrange(0, 10)}" if rng.random() < 0.4 else f"{part}.{rng.randrange(0, 100):02d}"

    return decimal(whole), decimal(other)


def _comparison(a: str, b: str, language: str) -> str:
    """The steps up to the one that decides, each closed by a separator."""
    en = language == "en"
    whole_a, _, rest_a = a.partition(".")
    whole_b, _, rest_b = b.partition(".")
    if len(whole_a) != len(whole_b):
        if en:
            return f"{whole_a} has {len(whole_a)} digits, {whole_b} has {len(whole_b)} digits; so "
        return f"{whole_a}有{len(whole_a)}位，{whole_b}有{len(whole_b)}位；所以"
    names = [PLACES[language][i] for i in reversed(range(len(whole_a)))]
    names += ["tenths", "hundredths"] if en else ["十分位", "百分位"]
    length = max(len(rest_a), len(rest_b))
    pairs = zip(whole_a + rest_a.ljust(length, "0"), whole_b + rest_b.ljust(length, "0"), strict=True)
    text = ""
    for name, (x, y) in zip(names, pairs, strict=False):
        text += f"{name} {x}{'<' if x < y else '>' if x > y else '='}{y}{'; ' if en else '；'}"
        if x != y:
            break
    return text + ("so " if en else "所以")


_SORT = {
    "up": {
        "en": (
            "Sort {0} in ascending order.",
            "Sort these numbers from smallest to largest: {0}.",
            "Put {0} in increasing order.",
            "Arrange {0} from smallest to largest.",
            "Order from least to greatest: {0}",
            "Sort the list: {0}",
            "Sort {0}.",
            "Sort {0}",
            "Sort the numbers {0}.",
            "Please sort {0}.",
        ),
        "zh": ("把{0}从小到大排列。", "请把{0}按从小到大的顺序排列。", "从小到大排列：{0}"),
    },
    "down": {
        "en": (
            "Sort {0} in descending order.",
            "Sort these numbers from largest to smallest: {0}.",
            "Put {0} in decreasing order.",
            "Arrange {0} from largest to smallest.",
            "Order from greatest to least: {0}",
        ),
        "zh": ("把{0}从大到小排列。", "请把{0}按从大到小的顺序排列。", "从大到小排列：{0}"),
    },
}


def sort(rng: random.Random, language: str) -> Exercise:
    count = rng.choices((3, 4, 5, 6), weights=(3, 4, 3, 1))[0]
    top = 1000 if count < 5 and rng.random() < 0.3 else 100
    values = [rng.randrange(top) for _ in range(count)]
    up = rng.random() < 0.65
    word = {"en": ("largest", "smallest"), "zh": ("最大", "最小")}[language][up]
    left, result = list(values), []
    steps = []
    while left:
        best = min(left) if up else max(left)
        left.remove(best)
        result.append(best)
        rest = ", ".join(map(str, left))
        if language == "en":
            steps.append(f"{word} {best}" + (f", left {rest}" if left else ""))
        else:
            steps.append(f"{word}{best}" + (f"，剩下{rest}" if left else ""))
    answer = ", ".join(map(str, result))
    reasoning = "\n".join(steps) + ("\nso " if language == "en" else "\n所以") + answer
    listing = rng.choice((", ", ", ", " ")).join(map(str, values))
    if rng.random() < 0.15:
        listing = f"[{listing}]"
    prompt = _say(rng, language, _SORT["up" if up else "down"], listing)
    return Exercise(",".join(map(str, sorted(values))), prompt, reasoning, answer)


_SEQUENCE = {
    "en": (
        "What is the next number in the sequence {0}?",
        "What comes next: {0}, ?",
        "Continue the sequence: {0}, ...",
        "Find the next term: {0}",
        "{0}, what comes next?",
        "Which number follows {0}?",
        "Complete the pattern: {0}, __",
        "What is the next term of {0}?",
        "{0}, ...",
        "{0}, what is next?",
        "Continue: {0}",
        "What number comes after {0}?",
        "Find the next number: {0}, ?",
    ),
    "zh": ("数列{0}的下一项是多少？", "找规律填数：{0}，？", "{0}，下一个数是多少？", "按规律，{0}的下一个数是什么？"),
}


def sequences(rng: random.Random, language: str) -> Exercise:
    terms, reasoning = rng.choices((_arithmetic, _growing, _geometric, _sums), weights=(5, 2, 3, 2))[0](rng, language)
    *shown, answer = terms
    reasoning = f"{_sum_check(shown)}\n{reasoning}"
    listing = ", ".join(map(str, shown))
    return Exercise(listing, _say(rng, language, _SEQUENCE, listing), reasoning, str(answer))


def _sum_check(terms: list[int]) -> str:
    """Is each term the sum of the two before? Said up to where it fails: the first thing to find out."""
    steps = []
    for a, b, c in zip(terms, terms[1:], terms[2:], strict=False):
        steps.append(f"{a}+{b}={a + b}")
        if a + b != c:
            return ", ".join(steps) + f"{'<' if a + b < c else '>'}{c}"
    return ", ".join(steps)


def _changes(terms: list[int], sign: str) -> str:
    """Differences or ratios of neighbours, as text."""
    pairs = zip(terms[1:], terms[:-1], strict=True)
    return ", ".join(f"{b}{sign}{a}={b - a if sign == '-' else b // a}" for b, a in pairs)


def _next(language: str) -> str:
    return "next " if language == "en" else "下一项"


def _arithmetic(rng: random.Random, language: str) -> tuple[list[int], str]:
    count, step, start = rng.randint(4, 5), rng.randint(1, 15), rng.randrange(0, 60)
    terms = [start + step * i for i in range(count + 1)]
    if rng.random() < 0.3:
        terms.reverse()
        last = f"{terms[-2]}-{step}={terms[-1]}"
        same = ", ".join(f"{a}-{b}={a - b}" for a, b in pairwise(terms[:-1]))
    else:
        last = f"{terms[-2]}+{step}={terms[-1]}"
        same = _changes(terms[:-1], "-")
    return terms, f"{same}\n{_next(language)}{last}"


def _growing(rng: random.Random, language: str) -> tuple[list[int], str]:
    """Differences that grow by a constant."""
    start, step, growth = rng.randrange(0, 30), rng.randint(1, 6), rng.randint(1, 4)
    terms = [start]
    for i in range(5):
        terms.append(terms[-1] + step + growth * i)
    if all(a + b == c for a, b, c in zip(terms, terms[1:], terms[2:5], strict=False)):
        return _growing(rng, language)  # two rules fit
    difference = step + growth * 4
    head = _changes(terms[:-1], "-")
    middle = f"{difference - growth}+{growth}={difference}"
    return terms, f"{head}\n{middle}\n{_next(language)}{terms[-2]}+{difference}={terms[-1]}"


def _geometric(rng: random.Random, language: str) -> tuple[list[int], str]:
    ratio = rng.choice((2, 2, 3, 3, 4, 5, 10))
    count = 4 if ratio < 4 else 3
    start = rng.randint(1, 30 if ratio == 2 else 12)
    terms = [start * ratio**i for i in range(count + 1)]
    work = times(terms[-2], ratio, language) if ratio < 10 else f"{terms[-2]}×10={terms[-1]}"
    return terms, f"{_changes(terms[:-1], '/')}\n{_next(language)}{work}"


def _sums(rng: random.Random, language: str) -> tuple[list[int], str]:
    """Each term the sum of the two before."""
    terms = [rng.randint(1, 9), rng.randint(1, 12)]
    while len(terms) < 6:
        terms.append(terms[-1] + terms[-2])
    return terms, f"{_next(language)}{plus(terms[3], terms[4], language)}"
