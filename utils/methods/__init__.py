"""What an outer step is, one method a file or folder, behind one interface.

May import experts and what is below it, not measure.
"""
