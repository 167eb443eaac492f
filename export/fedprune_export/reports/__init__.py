"""Pages and tables that tell people what an export did."""
