"""Answers made to hang, blow up or fool a math verifier."""

from __future__ import annotations

from hypothesis import strategies as st

HAND_LIST = {
    "tower of powers": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "tower of powers, plain": "the answer is 9**9**9**9**9",
    "tower in a fraction": r"\boxed{\frac{1}{7^{7^{7^{7}}}}}",
    "power of a decimal": r"\boxed{1.0000001^{10^{12}}}",
    "power of a sum": r"\boxed{(a+b+c+d+e+f)^{400}}",
    "huge factorial": r"\boxed{1000000000!}",
    "factorials of factorials": r"\boxed{((((9!)!)!)!)!}",
    "binomial": r"\boxed{\binom{10^{9}}{5 \cdot 10^{8}}}",
    "huge sum": r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^{n}}}",
    "product": r"\boxed{\prod_{n=1}^{10^{9}} n}",
    "integral": r"\boxed{\int_0^1 \int_0^1 e^{\sin(x^{y^{x}})} dx dy}",
    "limit": r"\boxed{\lim_{x \to 0} \frac{\sin(\tan x) - \tan(\sin x)}{\arcsin(\arctan x) - \arctan(\arcsin x)}}",
    "nested roots": r"\boxed{" + r"\sqrt{2+" * 30 + "2" + "}" * 31,
    "nested fractions": r"\boxed{" + r"\frac{1}{1+" * 35 + "1" + "}" * 36,
    "gigantic matrix": r"\boxed{\begin{pmatrix}" + r" \\ ".join(["1 & 2 & 3 & 4 & 5 & 6 & 7 & 8"] * 200) + r"\end{pmatrix}}",
    "matrix power": r"\boxed{\begin{pmatrix}1&1\\1&0\end{pmatrix}^{1000000000}}",
    "determinant": r"\boxed{\det\begin{pmatrix}a&b&c&d\\e&f&g&h\\i&j&k&l\\m&n&o&p\end{pmatrix}^{20}}",
    "open braces": "{" * 100_000,
    "closing braces": "}" * 100_000,
    "boxes in boxes": r"\boxed{" * 5_000 + "1" + "}" * 5_000,
    "open boxes": r"\boxed{" * 20_000,
    "brackets": "(" * 50_000 + "1" + ")" * 50_000,
    "left without right": r"$" + r"\left(" * 3_000 + "$",
    "a megabyte of digits": "9" * 2**20,
    "digits in a box": r"\boxed{" + "7" * 5_000 + "}",
    "digits with commas": "1," * 300_000,
    "dots": "." * 2**20,
    "equations": "x=" * 2_000 + "1",
    "one sum of many": r"\boxed{" + "+".join(f"x_{{{i}}}" for i in range(900)) + "}",
    "a polynomial of many variables": r"\boxed{" + "".join(f"({c}+1)" for c in "abcdefghjklmnopqrstuvwxyz") + "^{9}}",
    "long set": r"\boxed{\{" + ",".join(map(str, range(1500))) + r"\}}",
    "dollars": "$" * 50_000,
    "answer is, again and again": "the answer is " * 50_000,
    "final answers": "Final answer is: 1 " * 20_000,
    "spaces": "answer" + " " * 2**20 + "=",
    "backslashes": "\\" * 2**20,
    "null bytes": "\\boxed{\x00" + "\x00" * 10_000 + "5}",
    "right to left": "\u202e\\boxed{5\u202c}\u200f" * 2_000,
    "combining marks": "5" + "\u0301" * 100_000,
    "lone surrogates": "\\boxed{\ud800}",
    "other digits": "\\boxed{٣٤५}",
    "python": "$__import__('os').system('touch /tmp/hostile_math')$",
    "python in text": "the answer is __import__('os')._exit(0)",
    "lambda": r"\boxed{lambda: exec('1')}",
    "zero to a negative power": r"\boxed{0^{-1}}",
    "division by zero": r"\boxed{\frac{1}{0}}",
    "not a number": r"\boxed{\infty - \infty}",
    "mod by zero": r"\boxed{5 \mod 0}",
    "inequality": r"\boxed{x^{x^{x^{x}}} < \sin x < \tan(x^{x})}",
    "interval": r"\boxed{(-\infty, \infty) \cup (\infty, -\infty)}",
    "percent": r"\boxed{" + "%" * 5_000 + "}",
}

_LEAVES = st.one_of(
    st.sampled_from(
        ["9", "0", "x", "i", "e", r"\pi", r"\infty", "1000000007", "0.1", ".", ",", "=", "<", "-", "&", r"\\", "%", "$", "\x00"]
    ),
    st.integers(-(10**30), 10**30).map(str),
    st.text(max_size=8),
)
_FRAMES = (
    "{}^{{{}}}", "{}_{{{}}}", r"\frac{{{}}}{{{}}}", r"\sqrt[{}]{{{}}}", "({})({})", "{}+{}", "{}!{}", r"\binom{{{}}}{{{}}}",
    r"\sum_{{n={}}}^{{{}}} n", r"\int_{{{}}}^{{{}}} x dx", r"\left[{},{}\right)", r"\{{{},{}\}}", r"\log_{{{}}}{{{}}}", "{} = {}",
    r"\begin{{pmatrix}}{}&{}\end{{pmatrix}}", r"\text{{{}}}{}", "{} and {}", r"\boxed{{{}}}{}", "${}${}", "**{}**{}",
    r"{} \pmod{{{}}}",
)  # fmt: skip
_REPEATS = st.sampled_from([1, 1, 1, 2, 40, 3000])


@st.composite
def answers(draw: st.DrawFn) -> str:
    """Expressions of any nesting, torn and repeated, in a box or in prose."""
    frames = st.sampled_from(_FRAMES)
    inner = st.recursive(_LEAVES, lambda part: st.builds(lambda frame, a, b: frame.format(a, b), frames, part, part), max_leaves=24)
    text = draw(inner)
    text = text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 4)) == 0 else text
    return draw(st.sampled_from([r"\boxed{%s}", "The answer is $%s$.", "%s", r"\[ %s \]", "Final answer: %s"])).replace(
        "%s", text * draw(_REPEATS)
    )
