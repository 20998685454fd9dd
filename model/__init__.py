"""A GPT twice, as a textbook page and on gptkernels, with the program that trains, samples and compares them."""
