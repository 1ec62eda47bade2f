"""Lines of text on which two tokenizers are compared: hard ones, real ones and random ones."""

import random
import unicodedata
from collections.abc import Callable, Sequence
from itertools import islice

HARD = (
    "",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    " \n \t ",
    " a",
    "  a",
    "a ",
    "a  ",
    "   a   b   ",
    "\ta\tb\t",
    "a\nb\n\nc\r\nd\re",
    "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x0A>",
    "a<s>b</s>c<unk>d<pad>e<0x0A>f<0xE2>",
    "<s> </s> <unk> <s></s>",
    "[INST] <<SYS>> <|im_start|>user<|im_end|> <|endoftext|>",
    "\u2581",
    "\u2581a",
    "a\u2581",
    " \u2581 a\u2581\u2581b \u2581",
    "\u2581\u2581\u2581",
    "\0",
    "a\0b",
    "\0 \0",
    "".join(map(chr, range(1, 33))),
    "a\x01b\x1fc\x7fd\x80e\x9ff",
    "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg",
    "\u202eright to left\u202c",
    "cafe\u0301 re\u0301sume\u0301 A\u030a n\u0303",
    "\u0301",
    "\u0301\u0302a",
    "a\u0301\u0302\u0323b u\u0308\u0304 \u0041\u0323\u0307",
    "\n\u0301 \t\u0308\u0301",
    "\u212b \u2126 \u212a \ufb01\u0301 \ufb03 \u01c4 \u00bd \u2460 \u33a1 \u2122\ufe0f",
    "\uff21\uff22\uff43 \uff11\uff12 \uff76\uff9e\uff8a\uff9f\uff70 \uff5e \u30cf\u309a",
    "\u1112\u1161\u11ab\u1100\u1173\u11af \u3131\u314f\u3134 \u314b\u314b\u3160\u3160",
    "\u0628\u0651\u064e\u0633\u0652\u0645\u0650 \u05e9\u05c1\u05bc\u05b8",
    "\u0915\u093c \u0958 \u09c7\u09be \u0e01\u0e33 \u0eb3",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "\u2764\ufe0f 1\ufe0f\u20e3 \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "\u4e00\u9fff\U00020000\U0002a6d6 \ue000 \U000f0000 \U0010fffd \ufffd \ufffc",
    "\u1d400 \U0001d400\U0001d7ce \u2070\u2081 \u2160 \u00aa\u00ba\u00b5",
    "0123456789 3.14159 1,000,000 0x7fff 1e-5",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "don't can't I'll we've \u2018quoted\u2019 \u201cdouble\u201d \u2014 \u2013 \u2026",
    "aaaa aaaaaaa ---- ======== ......... !!!! hahahaha 000000",
    "https://example.org/a/b?c=d&e=%20#f user@example.org",
    "def f(x):\n    return {k: v for k, v in x.items()}\n\n\tif x != None:\r\n\t\tpass\n",
    "CamelCase snake_case kebab-case SCREAMING_CASE mixed123Case",
    "x" * 300,
    "ab" * 100,
    "word " * 60,
)

REAL = (
    "The quick brown fox jumps over the lazy dog, and nobody was surprised.",
    "It was the best of times, it was the worst of times; 1,234 people came on 4 July.",
    "Victor jagt zwölf Boxkämpfer quer über den großen Sylter Deich.",
    "Où est le garçon qui a mangé les œufs à Noël ? Là-bas, près du château.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia; añoraba a su niño.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń.",
    "Tiếng Việt có nhiều dấu: ở, ế, ượ, ẵ, và những từ khó.",
    "Съешь ещё этих мягких французских булок, да выпей же чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Τάχιστη αλώπηξ.",
    "すべての人間は、生まれながらにして自由であり、ガギグゲゴとパピプペポ。",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",  # noqa: RUF001
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "মানুষ জন্মগতভাবে স্বাধীন এবং সমান মর্যাদার অধিকারী।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์",
    "لە دایک بوون ئازادن ‌و می‌خواهم بدانم",
    "ყველა ადამიანი იბადება თავისუფალი. Բոլոր մարդիկ ծնվում են ազատ։",  # noqa: RUF001
    "Þjóðin sagði ýmislegt; İstanbul'da ışık ılık. Ĳsselmeer ŉ ſ",  # noqa: RUF001
)

RANGES = (
    (0x20, 0x7F),
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x370, 0x530),
    (0x5D0, 0x700),
    (0x900, 0xE80),
    (0x1E00, 0x2000),
    (0x2000, 0x2600),
    (0x3040, 0x3100),
    (0x4E00, 0xA000),
    (0xAC00, 0xD7A4),
    (0xF900, 0xFDD0),
    (0xFE30, 0xFFEE),
    (0x10000, 0x11000),
    (0x1D400, 0x1D800),
    (0x1F300, 0x1FA00),
    (0x20000, 0x2A6D7),
    (0, 0xD800),
    (0xE000, 0x110000),
)


def proof_lines(pieces: Sequence[str], count: int) -> list[str]:
    """The hard and the real lines, and random ones up to `count`; the same each time.

    pieces: the tokens of the tokenizer, as text.
    """
    lines = [*HARD, *_variants()]
    chooser = random.Random(0)
    makers: tuple[Callable[[], str], ...] = (
        lambda: "".join(chooser.choices(pieces, k=chooser.randrange(1, 30))),
        lambda: _spaced("".join(chooser.choices(pieces, k=chooser.randrange(1, 30)))),
        lambda: (
            chooser.choice(pieces) if chooser.random() < 0.5 else _spaced(chooser.choice(pieces))
        ),
        lambda: "".join(_character(chooser) for _ in range(chooser.randrange(1, 40))),
        lambda: chooser.randbytes(chooser.randrange(1, 60)).decode("latin-1"),
        lambda: _mixed(chooser, pieces),
    )
    while len(lines) < count:
        lines.append(chooser.choice(makers)())
    return list(islice(lines, count))


def _variants() -> list[str]:
    return [
        line
        for sentence in REAL
        for line in (
            sentence,
            f" {sentence} ",
            f"\t{sentence}\n{sentence}\n",
            sentence.replace(" ", "  "),
            sentence.upper(),
            unicodedata.normalize("NFD", sentence),
        )
    ]


def _mixed(chooser: random.Random, pieces: Sequence[str]) -> str:
    """Bits of everything, next to each other."""
    bits = []
    for _ in range(chooser.randrange(1, 6)):
        text = chooser.choice(chooser.choice((HARD, REAL, pieces)))
        start = chooser.randrange(len(text) + 1)
        bits.append(text[start : start + chooser.randrange(1, 20)])
    return chooser.choice(("", " ")).join(bits)


def _character(chooser: random.Random) -> str:
    low, high = chooser.choice(RANGES)
    code = chooser.randrange(low, high)
    free = 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE  # never characters
    return "?" if free else chr(code)


def _spaced(text: str) -> str:
    return text.replace("\u2581", " ")
