"""How well base and adapted model predict new text and prior text."""
