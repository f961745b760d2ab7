"""Families about words, the calendar and little stories."""

import random

from training.arithmetic import minus, plus, times
from training.exercise import Exercise
from training.number_families import number
from training.words import word

_COUNT = {
    "en": (
        'How many times does the letter "{0}" appear in "{1}"?',
        "How many {0}'s are in {1}?",
        "How many {0}s are there in the word {1}?",
        'Count the letter {0} in the word "{1}".',
        'How many "{0}" are in "{1}"?',
        "How many letters {0} are in the word {1}?",
        "How many {0} in {1}?",
        "How often does {0} occur in {1}?",
        "Count the {0}'s in {1}.",
        "how many {0}'s in {1}?",
        "How many times does {0} occur in '{1}'?",
        "How many {0}'s are in the word '{1}'?",
        "How many {0} are in {1}?",
        "Count how many times {0} appears in {1}.",
        "How many {0}s in '{1}'?",
        "How many {0}'s does {1} have?",
    ),
    "zh": ("单词{1}里有几个字母{0}？", "{1}中有多少个{0}？", "数一数单词{1}里的字母{0}有几个。"),
}


def count_letters(rng: random.Random, language: str) -> Exercise:
    text = word(rng)
    letter = rng.choice(text) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    seen, steps = 0, []
    for other in text:
        seen += other == letter
        steps.append(f"{other} {seen}" if other == letter else other)
    shown = text.capitalize() if rng.random() < 0.1 else text
    prompt = rng.choice(_COUNT[language]).format(letter, shown)
    head = "Spell it, counting {0}: {1}\nso {2}" if language == "en" else "一个一个数{0}：{1}\n所以是{2}"
    return Exercise(text, prompt, head.format(letter, ", ".join(steps), seen), str(seen))


_REVERSE = {
    "en": (
        'Reverse the word "{0}".',
        "Reverse {0}.",
        "Write {0} backwards.",
        "Spell {0} backwards.",
        'What is "{0}" spelled backwards?',
        'Reverse the string "{0}".',
        "What is {0} in reverse?",
        "Reverse the letters of {0}.",
        "reverse {0}",
        "Reverse the word '{0}'.",
        "Reverse the word '{0}'",
        "Reverse '{0}'.",
        "Spell '{0}' backwards.",
        "Reverse: {0}",
        "Reverse the word {0}.",
        "Write '{0}' in reverse.",
        'Reverse "{0}"',
        "What is {0} spelled backwards?",
        "Can you reverse the word {0}?",
        "Please write {0} backwards.",
    ),
    "zh": ("把{0}倒过来写。", "请把单词{0}反转。", "{0}倒序是什么？", "把{0}反过来写是什么？"),
}


def reverse(rng: random.Random, language: str) -> Exercise:
    text = word(rng, 10) if rng.random() < 0.8 else str(rng.randrange(100, 10 ** rng.randint(3, 7)))
    forward = [f"{i} {letter}" for i, letter in enumerate(text, 1)]
    head = "Letters: {0}\nBackwards: {1}\nso {2}" if language == "en" else "顺序：{0}\n倒序：{1}\n所以{2}"
    reasoning = head.format(", ".join(forward), ", ".join(reversed(forward)), text[::-1])
    return Exercise(text, rng.choice(_REVERSE[language]).format(text), reasoning, text[::-1])


DAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def dates_times(rng: random.Random, language: str) -> Exercise:
    kinds = (_weekday, _later, _between, _date, _minutes)
    return rng.choices(kinds, weights=(4, 4, 2, 2, 1))[0](rng, language)


def _weekday(rng: random.Random, language: str) -> Exercise:
    days = DAYS[language]
    start, count, forward = rng.randrange(7), rng.randint(2, 40), rng.random() < 0.7
    weeks, rest = divmod(count, 7)
    step = 1 if forward else -1
    path = [days[(start + step * i) % 7] for i in range(rest + 1)]
    answer = path[-1]
    if language == "en":
        phrases = (
            (
                "What day is {1} days after {0}?",
                "If today is {0}, what day is it in {1} days?",
                "Today is {0}. What day of the week will it be {1} days from now?",
                "It is {0}. Which day comes {1} days later?",
            )
            if forward
            else (
                "What day was {1} days before {0}?",
                "If today is {0}, what day was it {1} days ago?",
                "Today is {0}. Which day was {1} days ago?",
            )
        )
        reasoning = f"{count}={weeks}×7+{rest}, so {rest} days {'on' if forward else 'back'} from {path[0]}: "
    else:
        phrases = (
            ("今天是{0}，{1}天后是星期几？", "{0}过{1}天是星期几？")
            if forward
            else ("今天是{0}，{1}天前是星期几？", "{0}的{1}天前是星期几？")
        )
        reasoning = f"{count}={weeks}×7+{rest}，从{path[0]}往{'后' if forward else '前'}{rest}天："
    steps = [f"{i} {day}" for i, day in enumerate(path)]
    reasoning += ", ".join(steps)
    prompt = rng.choice(phrases).format(days[start], count)
    return Exercise(f"weekday {start} {step * count}", prompt, reasoning, answer)


def _clock(minutes: int) -> str:
    return f"{minutes // 60 % 24}:{minutes % 60:02d}"


def _later(rng: random.Random, language: str) -> Exercise:
    start, wait, forward = rng.randrange(24 * 60), rng.randint(5, 180), rng.random() < 0.7
    if rng.random() < 0.5:
        start, wait = start // 5 * 5, max(5, wait // 5 * 5)
    end = (start + (wait if forward else -wait)) % (24 * 60)
    lines, hour, minute = [], start // 60, start % 60
    if wait >= 60:
        hours, rest = divmod(wait, 60)
        lines.append(f"{wait}={hours}×60+{rest}")
        lines.append(f"{hour}{'+' if forward else '-'}{hours}={hour + hours if forward else hour - hours}")
        hour += hours if forward else -hours
        wait = rest
    if forward:
        total = minute + wait
        lines.append(plus(minute, wait, language))
        if total >= 60:
            lines.append(f"{total}-60={total - 60}, {hour}+1={hour + 1}")
            hour += 1
        if hour >= 24:
            lines.append(f"{hour}-24={hour - 24}")
    else:
        if minute >= wait:
            lines.append(minus(minute, wait, language))
        else:
            lines.append(f"{minute}<{wait}, {minute}+60={minute + 60}, {hour}-1={hour - 1}")
            lines.append(minus(minute + 60, wait, language))
            hour -= 1
        if hour < 0:
            lines.append(f"{hour}+24={hour + 24}")
    count = wait if not lines[0].count("×60") else int(lines[0].partition("=")[0])
    if language == "en":
        phrases = (
            (
                "What time is it {1} minutes after {0}?",
                "It is {0} now. What time will it be in {1} minutes?",
                "A train leaves at {0} and travels for {1} minutes. When does it arrive?",
                "The film starts at {0} and lasts {1} minutes. When does it end?",
            )
            if forward
            else ("What time was it {1} minutes before {0}?", "It is {0} now. What time was it {1} minutes ago?")
        )
        last = f"so {_clock(end)}"
    else:
        phrases = (
            ("现在是{0}，{1}分钟后是几点？", "从{0}开始，过{1}分钟是几点？")
            if forward
            else ("现在是{0}，{1}分钟前是几点？",)
        )
        last = f"所以{_clock(end)}"
    prompt = rng.choice(phrases).format(_clock(start), count)
    return Exercise(f"clock {start} {count if forward else -count}", prompt, "\n".join([*lines, last]), _clock(end))


def _between(rng: random.Random, language: str) -> Exercise:
    start = rng.randrange(6 * 60, 20 * 60) // 5 * 5
    gap = rng.randint(1, 36) * 5
    end = start + gap
    hours, minute, last = end // 60 - start // 60, start % 60, end % 60
    lines = [f"{end // 60}-{start // 60}={hours}"]
    if last < minute:
        lines.append(f"{last}<{minute}, {last}+60={last + 60}, {hours}-1={hours - 1}")
        hours, last = hours - 1, last + 60
    lines.append(minus(last, minute, language))
    lines.append(f"{hours}×60={hours * 60}")
    lines.append(plus(hours * 60, last - minute, language) if hours else f"0+{last - minute}={gap}")
    phrases = {
        "en": (
            "How many minutes are there between {0} and {1}?",
            "How many minutes is it from {0} to {1}?",
            "A lesson runs from {0} to {1}. How many minutes is that?",
        ),
        "zh": ("从{0}到{1}有多少分钟？", "{0}到{1}一共多少分钟？"),
    }
    prompt = rng.choice(phrases[language]).format(_clock(start), _clock(end))
    return Exercise(f"between {start} {end}", prompt, "\n".join(lines), str(gap))


def _date(rng: random.Random, language: str) -> Exercise:
    month, count = rng.randrange(12), rng.randint(2, 30)
    day = rng.randint(1, LENGTHS[month])
    if month == 1:  # no leap years to think about
        month = 2
    lines, total, later = [plus(day, count, language)], day + count, month
    en = language == "en"
    if total > LENGTHS[month]:
        length = LENGTHS[month]
        later = (month + 1) % 12
        lines.append(f"{MONTHS[month]} has {length} days" if en else f"{month + 1}月有{length}天")
        lines.append(minus(total, length, language))
        total -= length
        if later == 1 and total > 28:
            return _date(rng, language)
    answer = f"{MONTHS[later]} {total}" if en else f"{later + 1}月{total}日"
    shown = f"{MONTHS[month]} {day}" if en else f"{month + 1}月{day}日"
    phrases = {
        "en": (
            "What date is {1} days after {0}?",
            "Today is {0}. What is the date in {1} days?",
            "Which date comes {1} days after {0}?",
        ),
        "zh": ("{0}之后{1}天是几月几日？", "今天是{0}，{1}天后是几月几日？"),
    }
    lines.append(("so " if en else "所以") + answer)
    prompt = rng.choice(phrases[language]).format(shown, count)
    return Exercise(f"date {month} {day} {count}", prompt, "\n".join(lines), answer)


def _minutes(rng: random.Random, language: str) -> Exercise:
    hours, minutes = rng.randint(1, 12), rng.choice((0, 0, *range(5, 60, 5)))
    lines = [times(60, hours, language) if hours > 9 else f"{hours}×60={hours * 60}"]
    total = hours * 60 + minutes
    if minutes:
        lines.append(plus(hours * 60, minutes, language))
    if language == "en":
        span = f"{hours} hour{'s' if hours > 1 else ''}" + (f" and {minutes} minutes" if minutes else "")
        prompt = rng.choice(("How many minutes are in {0}?", "Convert {0} to minutes.", "{0} is how many minutes?"))
    else:
        span = f"{hours}小时" + (f"{minutes}分钟" if minutes else "")
        prompt = rng.choice(("{0}是多少分钟？", "{0}有多少分钟？"))
    return Exercise(f"minutes {total}", prompt.format(span), "\n".join(lines), str(total))


_NAMES = {
    "en": ("Tom", "Anna", "Ben", "Lucy", "Sam", "Mia", "Jack", "Emma", "Leo", "Kate", "Max", "Nina", "Paul", "Rosa"),
    "zh": ("小明", "小红", "小白", "小花", "小马", "小林", "小李", "小王"),
}
_ITEMS = {
    "en": ("apples", "books", "pencils", "coins", "cards", "eggs", "cookies", "marbles", "stickers", "flowers"),
    "zh": ("个苹果", "本书", "支铅笔", "块糖", "个面包", "朵花", "个鸡蛋"),
}
# Kind of story: operations on (a, b, c), then tellings. {n} name, {m} another name, {i} items.
_STORIES = {
    "a+b-c": {
        "en": (
            "{n} has {a} {i}. {n} buys {b} more and gives {c} to {m}. How many {i} does {n} have now?",
            "There are {a} {i} in a box. {n} puts in {b} more, then takes out {c}. How many {i} are in the box?",
            "{n} had {a} {i}, found {b} more and lost {c}. How many {i} are left?",
        ),
        "zh": (
            "{n}有{a}{i}，又买了{b}，送给{m}{c}。{n}现在有多少？",
            "{n}有{a}{i}，又得到{b}，用掉{c}，还剩下多少？",
        ),
    },
    "a-b-c": {
        "en": (
            "{n} has {a} {i}. {n} gives {b} to {m} and {c} to a friend. How many {i} are left?",
            "There are {a} {i} in the shop. {b} are sold in the morning and {c} in the evening. How many are left?",
        ),
        "zh": (
            "{n}有{a}{i}，给{m}{b}，又给朋友{c}，还剩下多少？",
            "店里有{a}{i}，上午卖出{b}，下午卖出{c}，还剩多少？",
        ),
    },
    "a+b*c": {
        "en": (
            "{n} has {a} {i} and buys {b} bags with {c} {i} each. How many {i} does {n} have in total?",
            "{n} has {a} {i}. Every day for {b} days {n} gets {c} more. How many {i} does {n} have then?",
        ),
        "zh": (
            "{n}有{a}{i}，又买了{b}包，每包{c}，一共有多少？",
            "{n}有{a}{i}，每天得到{c}，{b}天后一共有多少？",
        ),
    },
    "b*c-a": {
        "en": (
            "{n} buys {b} boxes of {c} {i} each and gives {a} {i} to {m}. How many {i} are left?",
            "There are {b} rows of {c} {i}. {a} {i} are taken away. How many are left?",
        ),
        "zh": (
            "{n}买了{b}包，每包{c}{i}，送给{m}{a}，还剩多少？",
            "有{b}排，每排{c}{i}，拿走{a}，还剩下多少？",
        ),
    },
    "b*c/d": {
        "en": (
            "{n} has {b} bags of {c} {i} and shares them equally among {d} friends. How many {i} does each friend get?",
            "{b} boxes with {c} {i} each are shared equally by {d} children. How many {i} does each child get?",
        ),
        "zh": ("{n}有{b}包，每包{c}{i}，分给{d}个朋友，每人一样多，每人有多少？",),
    },
}


def word_problems(rng: random.Random, language: str) -> Exercise:
    if rng.random() < 0.1:
        return _one_step(rng, language)
    kind = rng.choices(tuple(_STORIES), weights=(3, 3, 3, 3, 1))[0]
    d = 1
    if kind in ("a+b-c", "a-b-c"):
        a, b, c = rng.randint(5, 99), rng.randint(2, 60), rng.randint(2, 60)
        if rng.random() < 0.15:
            a = number(rng)
        while a + (b if kind == "a+b-c" else -b) < c or a < (b if kind == "a-b-c" else 0):
            a, b, c = rng.randint(20, 99), rng.randint(2, 60), rng.randint(2, 60)
        first = plus(a, b, language) if kind == "a+b-c" else minus(a, b, language)
        middle = a + b if kind == "a+b-c" else a - b
        result, second = middle - c, minus(middle, c, language)
    else:
        b, c = rng.randint(2, 9), rng.randint(2, 20)
        product = b * c
        first = times(c, b, language).replace(f"{c}×{b}={product}", f"{b}×{c}={product}")
        a = rng.randint(2, 60)
        if kind == "a+b*c":
            result, second = a + product, plus(a, product, language)
        elif kind == "b*c-a":
            a = rng.randint(1, min(product, 60))
            result, second = product - a, minus(product, a, language)
        else:
            d = rng.choice([n for n in range(2, 11) if product % n == 0] or [1])
            result = product // d
            second = f"{product}/{d}={result}"
    names = rng.sample(_NAMES[language], 2)
    story = rng.choice(_STORIES[kind][language])
    prompt = story.format(n=names[0], m=names[1], i=rng.choice(_ITEMS[language]), a=a, b=b, c=c, d=d)
    head = ("First: ", "Then: ") if language == "en" else ("先算：", "再算：")
    reasoning = f"{head[0]}{first}\n{head[1]}{second}"
    return Exercise(f"{kind} {a} {b} {c} {d}", prompt, reasoning, str(result))


_SHORT = {
    "+": {
        "en": (
            "{n} has {a} {i} and buys {b} more. How many {i} does {n} have?",
            "{n} has {a} {i} and {m} has {b}. How many {i} do they have together?",
            "There are {a} {i} here and {b} {i} there. How many are there in all?",
        ),
        "zh": ("{n}有{a}{i}，又买了{b}，现在有多少？",),
    },
    "-": {
        "en": (
            "{n} has {a} {i} and gives {b} to {m}. How many {i} are left?",
            "{n} had {a} {i} and lost {b}. How many does {n} have now?",
        ),
        "zh": ("{n}有{a}{i}，送给{m}{b}，还剩多少？",),
    },
    "*": {
        "en": (
            "There are {a} bags with {b} {i} each. How many {i} are there?",
            "{n} buys {a} boxes of {b} {i} each. How many {i} does {n} have?",
        ),
        "zh": ("{n}有{a}包，每包{b}{i}，一共有多少？",),
    },
}


def _one_step(rng: random.Random, language: str) -> Exercise:
    sign = rng.choice("+-*")
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    if sign == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 20)
        result, work = a * b, times(b, a, language).replace(f"{b}×{a}={a * b}", f"{a}×{b}={a * b}")
    elif sign == "-":
        a, b = max(a, b), min(a, b)
        result, work = a - b, minus(a, b, language)
    else:
        result, work = a + b, plus(a, b, language)
    names = rng.sample(_NAMES[language], 2)
    prompt = rng.choice(_SHORT[sign][language]).format(n=names[0], m=names[1], i=rng.choice(_ITEMS[language]), a=a, b=b)
    return Exercise(f"{a}{sign}{b}", prompt, work, str(result))
