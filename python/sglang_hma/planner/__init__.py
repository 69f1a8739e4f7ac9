"""When does prefill on another vendor's cards pay, and with how many of each."""
