"""What is made from the code for those who read: the reference's pages, the protocol's schemas, the site."""
