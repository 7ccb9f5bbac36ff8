"""What stands around an answer in a response. Tokenizers made from nothing have a token for each."""

ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
