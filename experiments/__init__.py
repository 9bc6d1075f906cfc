"""Does the method help, and how fast is it: the ablation, the benchmark, the static figures.

    python -m experiments.ablation
    python -m experiments.bench
    python -m experiments.static

README.md says what was measured, NOTES.md what was tried and dropped.
"""
