"""What a response is worth: rules first, everything that can hang in killable workers."""
