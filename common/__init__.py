"""What two or more of the scripts share, one idea a file."""
