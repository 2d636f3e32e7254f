"""The invariance suite: cases, what they train, how outcomes are compared. See test_invariance.py."""
