r"""Answers in the style of real data sets: a reference, what equals it, what does not.

One line of answers.txt is `reference ;; right | right ;; wrong | wrong`; the spaces around the bars carry no meaning.
"""

from pathlib import Path

TABLE = Path(__file__).with_name("answers.txt").read_text(encoding="utf-8")

# Whole responses: a reference, a response, whether it is right. GSM8K, MATH, minerva, OlympiadBench, multiple choice.
RESPONSES = [
    ("18", "She makes 9 * 2 = $18 every day.\n#### 18", True),
    ("18", "9 * 2 = 18\n#### 19", False),
    ("72", "Natalia sold 48/2 = 24 clips in May.\nAltogether she sold 48+24 = 72 clips.", True),
    ("48", "Natalia sold 48 clips in April and 24 in May, 72 in total.", False),
    ("7", "There are 7 apples left.", True),
    ("7", "There are 3 red and 4 green ones. She has 7 apples left.", True),
    ("3", "There are 3 red and 4 green ones. She has 7 apples left.", False),
    ("5", "Final Answer: The final answer is $5$. I hope it is correct.", True),
    ("6", "Final Answer: The final answer is $5$. I hope it is correct.", False),
    (r"\frac{3}{4}", r"Therefore, the probability is $\boxed{\frac{3}{4}}$.", True),
    ("3", r"Therefore, the probability is $\boxed{\frac{3}{4}}$.", False),
    ("7", r"First \boxed{6}, then we correct it: \boxed{7}.", True),
    ("6", r"First \boxed{6}, then we correct it: \boxed{7}.", False),
    ("7", r"\boxed{5} \boxed{6} \boxed{7} \boxed{8}", False),
    ("7", r"\boxed{\boxed{7}}", True),
    ("7", r"\boxed{x = 7}", True),
    ("7", r"The answer is \boxed{7 \text{ apples}}.", True),
    ("2", r"<answer>\boxed{2}</answer>", True),
    ("2", r"<answer>2</answer> or <answer>3</answer>", False),
    ("2", r"<think>\boxed{2}</think><answer>3</answer>", False),
    ("2", r"<answer>The answer is $\boxed{2}$</answer>", True),
    ("2", "<answer></answer>", False),
    ("2", r"\boxed{}", False),
    ("B", "Paris is the capital, so the correct answer is **B**.", True),
    ("B", "The correct answer is (B) Paris.", True),
    ("B", "(B)", True),
    ("B", "A is wrong, so B is the correct answer.", False),
    ("B", "The answer could be A, B, C or D.", False),
    ("B", "I cannot decide between A and B.", False),
    ("yes", "Since 2 divides 4, the answer is yes.", True),
    ("yes", "Since 2 does not divide 5, the answer is no.", False),
    ("17", "The answer is not 17.", False),
    ("17", "It isn't 17.", False),
    ("17", "The answer is between 10 and 17.", False),
    ("17", "I guess it may be 16 or 17", False),
    ("17", "x = 17 or x = 18", False),
    ("17", "the final answer is 17, maybe 18", False),
    ("17", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17", False),
    ("17", "Options: 15, 16, 17", False),
    ("17", "The result is\n17", True),
    ("17", "So we get\n$$x = 17.$$", True),
    ("17", "So we get \\[x = 17.\\]", True),
    (r"2\sqrt{3}", r"The side is $2\sqrt{3}$.", True),
    ("2", r"The side is $2\sqrt{3}$.", False),
    ("3", r"The side is 2\sqrt{3}", False),
    (r"\frac{1}{2}", "So the chance is 1/2.", True),
    ("2", "So the chance is 1/2.", False),
    ("1", "So the chance is 1/2.", False),
    ("0.5", "The chance is 50%.", True),
    ("50", "The chance is 50%.", False),
    ("1,234", "The total is 1,234 people.", True),
    ("234", "The total is 1,234 people.", False),
    ("-4", "Hence x = -4.", True),
    ("4", "Hence x = -4.", False),
    ("(2,3)", "The lines meet at the point (2, 3).", True),
    ("3", "The lines meet at the point (2, 3).", False),
    ("1, 2", "The solutions are $x = 1$ and $x = 2$.", True),
    ("2", "The solutions are $x = 1$ and $x = 2$.", False),
    ("1, 2", "The solutions are 1 and 2.", True),
    ("x>3", "The solution is $x > 3$.", True),
    ("x>3", r"The solution set is $(3, \infty)$.", True),
    ("3", "The solution is $x > 3$.", False),
    ("y=2x+1", "The line is $y = 2x + 1$.", True),
    ("100", "It costs $100.", True),
    ("100", "It costs $100 in the shop and 90 online.", False),
    ("10", "The length is 10 cm.", True),
    ("10 cm", "The length is 10 cm.", True),
    ("10 cm", "The length is 10 m.", False),
    ("3:30", "The train leaves at 3:30.", True),
    ("Monday", "So the day is Monday.", True),
    ("Tuesday", "So the day is Monday.", False),
    ("NaN", "NaN", True),
    ("5", "NaN", False),
    ("5", "None", False),
    ("5", "x", False),
    ("5", "I do not know.", False),
    ("5", "5 is not the answer", False),
    ("5", "5 5 5", False),
    ("5", "5; 6; 7", False),
    ("5", "{5,6}", False),
    ("5", "any number", False),
]


def pairs(table: str = TABLE) -> list[tuple[str, str, bool]]:
    """(reference, answer, whether it is right), each reference against itself too."""
    found = []
    for line in table.strip().splitlines():
        if line.startswith("# "):
            continue
        reference, right, wrong = (part.strip() for part in line.split(";;"))
        found.append((reference, reference, True))
        found += [(reference, answer.strip(), True) for answer in split_bars(right)]
        found += [(reference, answer.strip(), False) for answer in split_bars(wrong)]
    return found


def split_bars(text: str) -> list[str]:
    """Bars with spaces around them: |x-3| has others."""
    return [part for part in f" {text} ".split(" | ") if part.strip()]
