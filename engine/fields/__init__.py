"""What fields and arguments may hold: refused by name in one line, else in one form.

field_types  says it in a field's type (Count, Positive, InputPath, Literal): configs that a file or a command line
             fills, by `check_fields`.
values       says it as a rule (Whole(1), Real(low=0), Choice): what Python code gives the API, by `conform` or a call.

Both are called in `__post_init__` of a frozen dataclass. They stay two: values from Python may be scalars of numpy or
torch, arrays, dtypes and devices, and become plain numbers and names, at a call's speed (SamplingParams are made per
request); the types are also read, by `numeric_ranges` and by `marked_fields`, which finds the inputs of a run.
"""
