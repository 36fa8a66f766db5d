# The SIPI page: a CPU out of INIT arrives here in real mode and leaves in 64-bit mode, at the address it was given.
#
# On entry  (SIPI): CS = page >> 4, IP = 0; everything else as INIT leaves it.
# On exit:  long mode, four levels; CS = {code64}, DS = ES = SS = FS = GS = {data}; IF = DF = 0; interrupt table empty;
#           rsp, rsi as given; rax = the address jumped to; rbx = rdi = rbp = 0.
#
# Nothing here knows where the page lies: CS tells, and the three pointers that need a linear address are computed
# from it. Two CPUs at once would compute the same, but they would share the arguments: the page is used under a lock.
#
# Label prefix: sipi_.  ebx = linear address of the page, from the fourth instruction on.

    .pushsection .rodata.trampoline_sipi, "a", @progbits
    .balign {page_size}
    .globl  trampoline_sipi_page
    .type   trampoline_sipi_page, @object
trampoline_sipi_page:

    .code16
sipi_real:
    cli                                             # INIT clears IF; a jump here in a test may not have
    cld
    movw    %cs, %ax
    movw    %ax, %ds                                # data lies where the code does
    movzwl  %ax, %ebx
    shll    $4, %ebx
    movl    ${step_real}, {epitaph_step}

    leal    (sipi_gdt - sipi_real)(%ebx), %eax      # the three linear addresses
    movl    %eax, sipi_gdtr - sipi_real + 2
    leal    (sipi_protected - sipi_real)(%ebx), %eax
    movl    %eax, sipi_to_protected - sipi_real
    leal    (sipi_long - sipi_real)(%ebx), %eax
    movl    %eax, sipi_to_long - sipi_real

    lidtl   sipi_no_idt - sipi_real                 # a fault stops the CPU instead of running what lies at 0
    lgdtl   sipi_gdtr - sipi_real
    movl    ${cr0_protected}, %eax                  # also turns the caches on: INIT leaves CD as it was
    movl    %eax, %cr0
    ljmpl   *(sipi_to_protected - sipi_real)

    .code32
sipi_protected:
    movl    ${data}, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    movl    %eax, %fs
    movl    %eax, %gs
    movl    ${step_protected}, {epitaph_step}(%ebx)

    movl    ${cr4_pae}, %eax                        # and nothing else: four levels, no PCIDs, no CET
    movl    %eax, %cr4
    movl    {arg_cr3}(%ebx), %eax
    movl    %eax, %cr3
    movl    ${msr_efer}, %ecx
    movl    ${efer_long}, %eax                      # NXE too: trampoline_start64 of Linux has NX bits in its tables
    xorl    %edx, %edx
    wrmsr
    movl    ${cr0_long}, %eax
    movl    %eax, %cr0                              # long mode is active from here, in 32-bit code still
    ljmpl   *(sipi_to_long - sipi_real)(%ebx)

    .code64
sipi_long:
    movl    %ebx, %ebx                              # upper halves are undefined after the switch
    movq    {arg_stack}(%rbx), %rsp
    movq    {arg_arg}(%rbx), %rsi
    movq    {arg_entry}(%rbx), %rax
    movl    ${step_jump}, {epitaph_step}(%rbx)      # the arguments are read: the next CPU's may be written
    xorl    %edi, %edi
    xorl    %ebp, %ebp
    xorl    %ebx, %ebx
    jmp     *%rax

    .balign 8
sipi_to_protected:                                  # far pointers: offset, selector
    .long   0
    .word   {code32}
    .balign 8
sipi_to_long:
    .long   0
    .word   {code64}
    .balign 8
sipi_no_idt:
    .word   0
    .long   0
    .balign 8
sipi_gdtr:
    .word   sipi_gdt_end - sipi_gdt - 1
    .long   0
    .balign 8
sipi_gdt:                                           # the accessed bit is set, so that the CPU need not write here
    .quad   0
    .quad   0x00cf9b000000ffff                      # {code32}: 32-bit code, flat
    .quad   0x00af9b000000ffff                      # {code64}: 64-bit code
    .quad   0x00cf93000000ffff                      # {data}: data, flat
sipi_gdt_end:

    .org    trampoline_sipi_page + {args}           # fails to assemble when the code has grown into the arguments
    .org    trampoline_sipi_page + {page_size}
    .size   trampoline_sipi_page, {page_size}
    .popsection
