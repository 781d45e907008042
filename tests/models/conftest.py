def pytest_addoption(parser):
    parser.addoption("--full-size", action="store_true", help="parity of the whole base model, not of two layers")
