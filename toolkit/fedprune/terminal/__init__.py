"""What commands print for people, and how they are installed and explained."""
