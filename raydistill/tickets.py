"""Support tickets for the demo, written by a seeded grammar.

A ticket has a main topic and often mentions a second one; its shape says how. In a plain ticket the words give the
category away, in the others their order does: a model that reads beats one that counts. The category of a `mixed` or
`grey` ticket is itself drawn between two, so that the best answer there is a probability.
"""

import csv
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Draw = Callable[[], float]


class Ticket(NamedTuple):
    """A ticket and how it came about: `category` is `main` with probability `main_share`, and `side` otherwise."""

    text: str
    category: str
    shape: str
    main: str
    side: str
    main_share: float


CATEGORIES = {"billing": 0.23, "refund": 0.17, "account": 0.18, "shipping": 0.23, "technical": 0.19}

# How often a ticket takes a shape, and where the main topic is not always the category, how often it is.
SHAPES = {"plain": 0.49, "aside": 0.12, "denied": 0.11, "settled": 0.06, "ranked": 0.04, "mixed": 0.12, "grey": 0.06}
MAIN_SHARES = {"ranked": 0.95, "mixed": 0.7, "grey": 0.6}

# The grammar: | parts alternatives, {name} is written out once per ticket, {Name} the same with a capital, # a digit.
# {main} and {side} are CLAUSES, {main_topic} and {side_topic} TOPICS, {fine} says that the side topic is all right.
PATTERNS = {
    "plain": """{Main}. | {Main}! | {Main}. {Extra} | {Main}. {Extra} | {Extra} {Main}. |
        A question about {main_topic}. | I need help with {main_topic}. | I have a problem: {main}. |
        Unfortunately {main}. | As I said on the phone, {main}. | I hope you can help, {main}. |
        The thing is that {main}. {Extra}""",
    "aside": """{Fine}, but {main}. | {Main}. {Fine}. | {Fine}. The trouble is that {main}. | While {fine}, {main}.""",
    "denied": """It is not about {side_topic}, {main}. | This is not about {side_topic}, it is about {main_topic}. |
        My question is about {main_topic}, not about {side_topic}. | {Main}. It is not a question of {side_topic}. |
        This has nothing to do with {side_topic}. It is {main_topic} that I need help with. |
        I am not asking about {side_topic}. What I need sorted out is {main_topic}. |
        Your form keeps asking about {side_topic}, but I have a question about {main_topic}. |
        I am not complaining about {side_topic} but about {main_topic}. |
        The matter is {main_topic} and not {side_topic}, as your colleague thought.""",
    "settled": """Last time I wrote because {side}. That is settled, but now {main}. |
        {Main}. This is a new matter: the earlier one, that {side}, is solved. |
        Forget my older message that {side}. Now {main}. |
        You already solved my problem that {side}. Today I write because {main}. |
        My earlier ticket about {side_topic} can be closed, the open one is about {main_topic}.""",
    "ranked": """{Side}, but that can wait. What really matters is that {main}. |
        My main problem is that {main}. Less urgent: {side}. | A small thing first: {side}. More important, {main}. |
        {Main}, this is urgent. When you have time, {side} as well.""",
    "mixed": """{Main}. Also, {side}. | {Main} and {side}. | Two things: {main}, and {side}. |
        {Main}. By the way, {side}. | {Main}. On top of that, {side}. |
        I have questions about {main_topic} and {side_topic}.""",
    "grey": "{Grey}. | {Grey}! | I have a problem: {grey}. | Unfortunately {grey}. | The thing is that {grey}.",
}

CLAUSES = {
    "billing": """I was charged twice for {order} | the {bill} says {amount} although the {product} costs {less} |
        my card was debited {amount} on {date} and I do not know what for | the tax on the {bill} is wrong |
        the discount code is missing on the {bill} for {order} | the {plan} renewed at a price I never agreed to |
        I never got the {bill} for {order} by email | the {bill} shows the name of my old company |
        the price went up by {less} at the checkout | a delivery fee of {less} is on the {bill} for {order} |
        I paid by bank transfer on {date} and {order} is still marked as unpaid |
        the {bill} lists two parcels but I only bought one {product} | the app charged {amount} for a free trial |
        I got a payment reminder for {order} although it is paid | my gift card was not taken off {order}""",
    "refund": """I sent the {product} back {ago} and the money is not on my card |
        I got store credit instead of {amount} | I cancelled {order} and never got my {amount} back |
        the {product} came broken and I want my money back | only {less} of {amount} was paid back |
        the courier took the return on {date} but nothing was paid back |
        I want to return the {product} because it is too small | the refund went to a card that I closed |
        a refund of {amount} was promised {ago} and the {bill} still says paid |
        the wrong {product} was delivered and I want to send it back |
        I cancelled the {plan} in time and the fee should come back to me |
        the {parcel} was lost and I now want the money, not a new one | the return of the {product} was turned down |
        the app says refunded but my bank has not received {amount}""",
    "account": """I cannot change the email address in my {profile} |
        my {profile} is locked after three wrong passwords | the email to reset my password never comes |
        I have two accounts and want to merge them | someone in {city} logged in to my {profile} |
        I want my {profile} and all my data deleted | the login code goes to my old phone number |
        I cannot edit the delivery address in my {profile} | I want to move the {plan} to the name of my partner |
        the order history in my {profile} is empty | my name is misspelt in my {profile} and on every {bill} |
        I cannot remove an old card from my {profile} |
        I was logged out on my {device} and my password is not accepted |
        I signed up twice and cannot close one account | I do not know which email address I used for {order}""",
    "shipping": """my {parcel} has not arrived although it was due {ago} |
        half of {order} is missing from the {parcel} | the tracking says delivered but there is no {parcel} here |
        the {parcel} is stuck in {city} since {date} | the {product} was left with a neighbour I do not know |
        the courier never rang and took my {parcel} back | the delivery of {order} was moved for the third time |
        customs wants {less} before I get my {parcel} | the tracking number of {order} does not exist |
        the pick-up shop has no {parcel} in my name |
        the {parcel} goes to my old address although I changed it in my {profile} |
        I paid {less} for express and {order} was sent by normal mail | I need {order} sent to {city} instead |
        the box was torn open and the {product} was gone | the {product} on the {bill} was not in the {parcel}""",
    "technical": """the {app} crashes when I open the {bill} | the checkout page shows {error} in {browser} |
        the login page stays blank in {browser} | the {product} does not pair with my {device} |
        the search in the {app} is broken since {date} | the payment page freezes after I type my card number |
        the tracking page does not load on my {device} | the update of the {product} stops at 8# percent |
        the {app} logs me out each time I close it | the return form ends with {error} on my {device} |
        the download of the {bill} gives an empty file | the {product} no longer connects to the wifi |
        the {app} is so slow on my {device} that I cannot order | the {app} repeats one delivery message all day |
        the button to save my address does nothing in {browser}""",
}

# What two desks would both take, the first slightly more often.
GREY = {
    ("billing", "refund"): """I was charged twice for {order} and want {amount} back |
        {order} was cancelled but {amount} was still taken from my card""",
    ("refund", "shipping"): """the return label for the {product} never arrived |
        I sent the {product} back on {date} and the tracking of the return has stopped""",
    ("shipping", "refund"): """the {parcel} never came and I would like my {amount} back |
        the {product} was damaged on the way and cannot be used""",
    ("technical", "account"): """I cannot log in because the {app} shows {error} |
        the {app} does not accept my password in {browser} | the link to reset my password opens an empty page""",
    ("technical", "billing"): """my saved card is refused by the {app} on my {device} |
        the {app} shows a different price than the {bill} for {order}""",
}

TOPICS = {
    "billing": "the {bill} | the payment | the amount you charged | the price I paid | the money you took",
    "refund": "the refund | the return | the money I am owed | getting my money back | sending the {product} back",
    "account": "my {profile} | my login | my password | my personal data | the email address I signed up with",
    "shipping": "the delivery | the {parcel} | the courier | the tracking | the delivery address",
    "technical": "the {app} | {error} | the login page | a bug on the checkout page | setting up the {product}",
}
FINE = {
    "billing": "the {bill} is correct | the payment of {amount} went through | I was charged the right price",
    "refund": "the refund of {less} came quickly | I do not want my money back | the return of the rest was easy",
    "account": "my {profile} is fine | my password works | I can log in | my email address is right",
    "shipping": "the {parcel} came on time | the delivery was quick | the courier was friendly",
    "technical": "the {app} works well | the {app} is quick now | there is no error on the website",
}
EXTRAS = {
    "billing": "My bank statement shows it. | I pay by card. | I compared the prices. | Please correct the {bill}.",
    "refund": "I kept the return slip. | It is unused. | Please pay it back. | When do I get my {amount}?",
    "account": "I tried on my {device}. | I live in {city}. | Please change it for me. | Please confirm by email.",
    "shipping": "I was at home all day. | The address is right. | Please send a new one. | Where is it?",
    "technical": "I tried {browser} too. | It says {error}. | Is there a fix? | Should I install it again?",
}
WORDS = {
    "greeting": "Hi, | Hello, | Hello team, | Good morning, | Dear support, | Hey there, | Hi {name} again,",
    "opener": """This is about {order}. | I bought a {product} on {date}. | I have been a customer for # years. |
        I wrote {ago}, no answer yet. | I am quite annoyed. | I ordered from {city} with my {device}.""",
    "plea": """Please look into it. | Can you help? | What should I do now? | Please answer before {date}. |
        Please call me back. | I expect a reply this week. | I can send a screenshot. | Who can help me with this?""",
    "closer": "Thanks! | Thank you. | Regards, {name} | Best wishes, {name} | Many thanks, {name} | {name}",
    "order": "order 5#### | order HX-4### | my order | my order from {date} | order no. 7#### | the {product}",
    "amount": "$7#.#0 | 8#.## euros | £6#.## | 1## dollars | €12#.#0 | 9# EUR",
    "less": "$1#.#0 | 2#.## euros | £3# | 2# dollars | €1#.#9 | 4# EUR",
    "date": "1# March | 2# April | June 1# | 1# Nov | the 1#th | Monday | Thursday | Friday | Sunday",
    "ago": "# days ago | two weeks ago | on {date} | last week | a month ago | last Saturday",
    "product": """lamp | coffee grinder | backpack | sports watch | heater | reader | speaker | camera | blender |
        smart plug | router | hard drive | monitor | toaster | printer | headset | vacuum robot""",
    "parcel": "parcel | package | shipment | order | box",
    "bill": "bill | invoice | receipt | statement",
    "plan": "Plus plan | family plan | yearly plan | premium membership | subscription",
    "profile": "account | profile | customer account | user account",
    "app": "app | website | shop page | mobile app | site",
    "device": "phone | laptop | tablet | Android phone | work computer",
    "browser": "Firefox | Chrome | Safari | Edge",
    "error": "error 50# | error E-1# | an error message | code 4## | a timeout",
    "city": "Leeds | Porto | Lyon | Graz | Utrecht | Boston | Cork | Malmo | Turin | Denver",
    "name": "Anna | Tom | Maria | J. Smith | Lena K. | Omar | Priya | Chris | Yuki | P. Novak",
}

# The parts of a ticket in their order, and how often each is there.
PARTS = {"greeting": 0.35, "opener": 0.35, "body": 1.0, "plea": 0.35, "closer": 0.3}
SPOKEN = {"cannot": "can't", "I am ": "I'm "} | {f"{verb} not ": f"{verb}n't " for verb in ("do", "does", "has", "is")}
NEXT_KEY = str.maketrans("qwertyuiopasdfghjklzxcvbnm", "wertyuioposdfghjklkxcvbnmn")


def write_tickets(folder: Path, *, train_rows: int = 3000, test_rows: int = 1000, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.csv` and `test.csv` (columns text, category; UTF-8) into the folder and return their paths.

    The two come from separate streams of the same grammar. The same arguments give the same bytes.
    Raises ValueError if a row count is not positive.
    """
    if min(train_rows, test_rows) < 1:
        raise ValueError(f"train_rows is {train_rows} and test_rows is {test_rows}, both must be at least 1.")
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train_rows), ("test", test_rows)):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("text", "category"))
            writer.writerows(generate(rows, f"{split} {seed}"))
    return folder / "train.csv", folder / "test.csv"


def generate(rows: int, seed: int | str = 0) -> Iterator[tuple[str, str]]:
    """Yield `rows` pairs of text and category, one at a time; fewer rows of a seed are its first rows."""
    # random() is the one method whose sequence Python keeps from version to version, so every choice is made with it.
    draw = random.Random(str(seed)).random
    for _ in range(rows):
        ticket = draw_ticket(draw)
        yield ticket.text, ticket.category


def draw_ticket(draw: Draw) -> Ticket:
    """A ticket of 5 to about 60 words, made with the numbers in [0, 1) that `draw` returns."""
    shape = _weighted(draw, SHAPES)
    main = _weighted(draw, CATEGORIES)
    side = _pick(draw, tuple(other for other in CATEGORIES if other != main))
    if shape == "grey":
        main, side = _pick(draw, tuple(GREY))
    template = " ".join(["{" + part + "}" for part, chance in PARTS.items() if draw() < chance])
    text = template.format_map(_Slots(draw, _grammar(shape, main, side)))
    main_share = MAIN_SHARES.get(shape, 1.0)
    category = main if draw() < main_share else side
    return Ticket(_roughened(text, draw), category, shape, main, side, main_share)


class _Slots(dict[str, str]):
    """What each name of the grammar stands for in one ticket, drawn when it is first asked for."""

    def __init__(self, draw: Draw, grammar: dict[str, tuple[str, ...]]) -> None:
        self.draw = draw
        self.grammar = grammar

    def __missing__(self, name: str) -> str:
        if name[0].isupper():
            text = self[name.lower()]
            text = text[0].upper() + text[1:]
        else:
            text = _pick(self.draw, self.grammar[name])
            if "{" in text:
                text = text.format_map(self)
            while "#" in text:
                text = text.replace("#", str(2 + int(self.draw() * 8)), 1)
        self[name] = text
        return text


@cache
def _alternatives(text: str) -> tuple[str, ...]:
    return tuple(" ".join(alternative.split()) for alternative in text.split("|"))


@cache
def _grammar(shape: str, main: str, side: str) -> dict[str, tuple[str, ...]]:
    """Every name that a ticket of this shape and these topics can use, with its alternatives."""
    rules = WORDS | {
        "body": PATTERNS[shape],
        "main": CLAUSES[main],
        "side": CLAUSES[side],
        "main_topic": TOPICS[main],
        "side_topic": TOPICS[side],
        "fine": FINE[side],
        "extra": EXTRAS[main],
        "grey": GREY.get((main, side), ""),
    }
    return {name: _alternatives(text) for name, text in rules.items()}


def _pick(draw: Draw, items: tuple[T, ...]) -> T:
    return items[int(draw() * len(items))]


def _weighted(draw: Draw, shares: dict[str, float]) -> str:
    """One of the keys, drawn with the probability that is its value."""
    point = draw()
    *others, last = shares
    for name in others:
        point -= shares[name]
        if point < 0:
            return name
    return last


def _roughened(text: str, draw: Draw) -> str:
    """The text as a hurried customer types it: contracted, in lower case, without punctuation, with slips."""
    if draw() < 0.5:
        for written, spoken in SPOKEN.items():
            text = text.replace(written, spoken)
    if draw() < 0.2:
        text = text.lower()
    if draw() < 0.15:
        text = text.replace(",", "").replace("'", "")
    if draw() < 0.15:
        text = text.rstrip(".!?")
    if draw() < 0.4:
        for _ in range(1 + int(draw() * 3)):
            text = _with_slip(text, draw)
    return text


def _with_slip(text: str, draw: Draw) -> str:
    """The text with two letters swapped, or one letter dropped, doubled or replaced by its neighbour on the keys."""
    at = int(draw() * (len(text) - 1))
    first, second = text[at], text[at + 1]
    if not (first.isalpha() and second.isalpha()):
        return text
    slips = (second + first, second, first + first + second, first.translate(NEXT_KEY) + second)
    return text[:at] + _pick(draw, slips) + text[at + 2 :]
