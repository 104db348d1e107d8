"""What the user asks for, read from files and the command line, and checked.

Every command reads its settings from here, and every room takes them as frozen dataclasses. In the
order of reading:

    keys           every key: its default, its meaning and the values that it may have
    settings       all settings of a run together, and what must hold between them
    command_line   from arguments and a settings file to checked settings; --help
    settings_file  a YAML or JSON file of settings, with the line of every value
    fields         how one setting is declared, read from text and checked
    foreign_keys   keys of LLaMA-Factory and the HF Trainer that are ignored or refused here
    text_files     text and JSON files, whatever they hold
    errors         what ends a run early, and the exit codes
    terminal       progress bars, and a stream that outlives its reader
"""
