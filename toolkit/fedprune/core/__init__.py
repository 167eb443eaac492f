"""What everything else needs: errors, checks of values, files, random numbers, texts. Imports no other room."""
