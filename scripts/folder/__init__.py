"""One command for a folder of pictures: look, choose for the time given, distil, measure, show."""
