"""What runs inside the children: no trio here."""
