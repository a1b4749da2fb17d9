"""The kinds of engines, one file a runtime; `engines/at_hand.py` lists them best first."""
