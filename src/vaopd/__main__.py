from vaopd.cli import main

main()
