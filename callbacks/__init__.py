"""Lightning callbacks, one per file; hooks only, the arithmetic is in ``functional``."""
