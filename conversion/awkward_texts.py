"""Texts on which the ids of a converted tokenizer are compared with those of its source."""

from collections.abc import Iterable

# Where converted tokenizers went wrong before; each is encoded by SentencePiece and by the new tokenizer.
AWKWARD_TEXTS = (
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "  leading and trailing  ",
    *(" " * count for count in (3, 15, 16, 17, 31, 32, 33, 100)),
    "a" + " " * 7 + "b" + " " * 18 + "c",
    "\t",
    "\t\tx\t y \t",
    "def f(x):\n    if x:\n        return [\n            x,\n        ]\n\n\n\tpass\n",
    "\n",
    "\n\n \n  \n",
    "line\r\nline\rline\x0b\x0c\x85\u2028\u2029end",
    "\u00a0no-break\u2003em\u3000ideographic\u200bzero\ufeffmark",
    "▁ ▁▁ a▁b",
    "1234567890 3.14159 1,000,000 ½ ² ٣ 五",
    "The quick brown fox's \"jumps\" -- over (the) lazy dog... don't!?",
    "aaaaaaaaaaaaaaaaaaaaaaa ========================= ------------ .......",
    "ﬁ ﬀ Å A\u030a é e\u0301 ẛ̣ ＡＢＣ ㎏ İ ß",
    "Привет, мир. Γειά σου. שלום عليكم สวัสดี नमस्ते",
    "你好，世界。龘䶮𠮷 こんにちは カタカナ 안녕하세요",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷",
    "".join(chr(code) for code in range(32)) + "\x7f\x80\x9f",
    "a\x00b\x00",
    "\U0010ffff\ue000\ufffd\ufffe",
    "<s>",
    "</s>",
    "<unk>",
    "<s> [INST] <<SYS>>\nx\n<</SYS>>\n\n</s><s>y</s> <unk>",
    "<0x0A> <0x00><0xFF>",
    "https://example.org/?q=%20&x=[1]#frag {'key': \\n}",
)


def control_texts(tokens: Iterable[str]) -> list[str]:
    """Texts that spell control tokens and added tokens: alone, twice, inside a word, between spaces, at both ends."""
    return [
        text
        for token in tokens
        for text in (token, token * 2, f"a{token}b", f"a {token} b", f"{token}\n{token} ", f" {token}a")
    ]
