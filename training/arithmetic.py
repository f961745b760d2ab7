"""Written-out arithmetic, one digit at a time: the steps that every family's reasoning is made of."""

PLACES = {
    "en": ("ones", "tens", "hundreds", "thousands", "ten thousands"),
    "zh": ("个位", "十位", "百位", "千位", "万位"),
}
_WORDS = {
    "en": {"write": ", write {}", "carry": ", carry {}", "next": "; ", "so": "so ", "borrow": "borrow, "},
    "zh": {"write": "，写{}", "carry": "，进{}", "next": "；", "so": "所以", "borrow": "借1，"},
}


def digits(number: int) -> list[int]:
    """Ones first."""
    return [int(digit) for digit in reversed(str(number))]


def plus(a: int, b: int, language: str) -> str:
    """a+b worked out; ends in `a+b=c`."""
    if min(a, b) < 10 and max(a, b) < 100:
        return f"{a}+{b}={a + b}"
    words, places = _WORDS[language], PLACES[language]
    x, y = digits(a), digits(b)
    length = max(len(x), len(y))
    steps, carry = [], 0
    for i in range(length):
        terms = [x[i] if i < len(x) else 0, y[i] if i < len(y) else 0]
        terms += [carry] if carry else []
        total = sum(terms)
        step = f"{places[i]} {'+'.join(map(str, terms))}={total}"
        if i < length - 1:
            carry = total // 10
            step += words["write"].format(total % 10)
            step += words["carry"].format(carry) if carry else ""
        else:
            step += words["write"].format(total)
        steps.append(step)
    return words["next"].join([*steps, f"{words['so']}{a}+{b}={a + b}"])


def minus(a: int, b: int, language: str) -> str:
    """a-b for a >= b, worked out; ends in `a-b=c`."""
    assert a >= b
    if b < 10 and a < 100:
        return f"{a}-{b}={a - b}"
    words, places = _WORDS[language], PLACES[language]
    x, y = digits(a), digits(b)
    steps, borrow = [], 0
    for i, digit in enumerate(x):
        terms = ([1] if borrow else []) + [y[i] if i < len(y) else 0]
        tail = "".join(f"-{term}" for term in terms)
        rest = digit - sum(terms)
        if rest < 0:
            steps.append(f"{places[i]} {digit}{tail}: {words['borrow']}1{digit}{tail}={rest + 10}")
            borrow = 1
        else:
            steps.append(f"{places[i]} {digit}{tail}={rest}")
            borrow = 0
    return words["next"].join([*steps, f"{words['so']}{a}-{b}={a - b}"])


def times_digit(a: int, digit: int, language: str) -> str:
    """a×digit worked out; ends in `a×digit=c`."""
    if a < 10:
        return f"{a}×{digit}={a * digit}"
    words, places = _WORDS[language], PLACES[language]
    x = digits(a)
    steps, carry = [], 0
    for i, other in enumerate(x):
        product = other * digit
        step = f"{places[i]} {other}×{digit}={product}"
        if carry:
            step += (
                f", {product}+{carry}={product + carry}"
                if language == "en"
                else f"，{product}+{carry}={product + carry}"
            )
        product += carry
        if i < len(x) - 1:
            carry = product // 10
            step += words["write"].format(product % 10)
            step += words["carry"].format(carry) if carry else ""
        else:
            step += words["write"].format(product)
        steps.append(step)
    return words["next"].join([*steps, f"{words['so']}{a}×{digit}={a * digit}"])


def times(a: int, b: int, language: str) -> str:
    """a×b for b below 100, worked out over one or more lines; ends in `a×b=c`."""
    if b < 10:
        return times_digit(a, b, language)
    if a < 10:
        return f"{times_digit(b, a, language)}\n{a}×{b}={a * b}"
    tens, ones = b // 10, b % 10
    if ones == 0:
        return f"{times_digit(a, tens, language)}\n{a}×{b}={a * b}"
    lines = [
        f"{b}={tens * 10}+{ones}",
        times_digit(a, ones, language),
        times_digit(a, tens, language),
        f"{a}×{tens * 10}={a * tens * 10}",
        plus(a * tens * 10, a * ones, language),
        f"{a}×{b}={a * b}",
    ]
    return "\n".join(lines)
