"""How commands print and draw: tables, machine formats, figures."""
