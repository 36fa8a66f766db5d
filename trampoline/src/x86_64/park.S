# The park page: where a CPU waits while it belongs to no kernel. Firmware side of the ACPI wakeup mailbox, and the
# reset vector of the MADT's wakeup structure.
#
# On entry  (offset 0): 64-bit mode, this page identity-mapped by whatever CR3 is loaded; all else unknown: CR4,
#           descriptor tables, selectors and stack may be those of a kernel whose memory is already someone else's.
# On exit   (wakeup vector): long mode, own identity tables; CS = {code64}, DS = ES = SS = FS = GS = {data}; RFLAGS = 2;
#           CR0 and CR4 as listed in README.md; EFER.NXE set; rsp in this page and not to be used; NMIs may be blocked.
#
# No stack is shared knowledge here: any number of CPUs run this page at once. Two things stand in for it:
# - a constant far frame, popped to load CS, SS, RSP and RFLAGS;
# - a scratch area that rsp points to. An NMI writes its frame there, over another CPU's perhaps, but nobody ever
#   reads it: the handler leaves through the constant frame and starts the wait afresh.
# Whatever is written into the page at run time (addresses, derived from rip) is the same for every CPU.
#
# Label prefix: park_.  Registers: edi = APIC id, rsi = mailbox, ebp = not 0 once woken, r8 = wakeup vector.

    .pushsection .rodata.trampoline_park, "a", @progbits
    .balign {page_size}
    .globl  trampoline_park_page
    .type   trampoline_park_page, @object
trampoline_park_page:

    .code64
park_entry:
    endbr64                                         # the last kernel may have indirect-branch tracking on
    cli
    cld
    movq    %cr4, %rax
    movq    park_arg_cr3_4level(%rip), %rcx
    testl   ${cr4_la57}, %eax                       # LA57 stays as it is while paging is on: take the tables that fit
    cmovnzq park_arg_cr3_5level(%rip), %rcx
    movq    %rcx, %cr3                              # first of all: the tables loaded so far may vanish any time
    xorl    %ebp, %ebp                              # not woken

    testl   ${cr4_vmxe}, %eax                       # in VMX operation INIT is held back and CR4.VMXE cannot be cleared;
    jz      park_no_vmx                             # Linux has the bit set exactly while VMXON is in force
    vmxoff
park_no_vmx:
    andl    ${cr4_kept}, %eax                       # off: PCIDE (CR3's low bits are 0 now), PGE (flushes global
    orl     ${cr4_pae}, %eax                        # entries), SMEP, SMAP, CET, PKE, FRED and all in the upper half
    movq    %rax, %cr4

    leaq    park_gdt(%rip), %rax                    # the addresses that depend on where this page lies
    movq    %rax, park_gdtr + 2(%rip)
    leaq    park_idt(%rip), %rax
    movq    %rax, park_idtr + 2(%rip)
    leaq    park_ready(%rip), %rax
    movq    %rax, park_frame(%rip)
    leaq    park_scratch_top(%rip), %rsp
    movq    %rsp, park_frame + 24(%rip)
    leaq    park_nmi(%rip), %rax
    movw    %ax, park_gate_nmi(%rip)
    shrq    $16, %rax
    movw    %ax, park_gate_nmi + 6(%rip)
    shrq    $16, %rax
    movl    %eax, park_gate_nmi + 8(%rip)
    leaq    park_machine_check(%rip), %rax
    movw    %ax, park_gate_mce(%rip)
    shrq    $16, %rax
    movw    %ax, park_gate_mce + 6(%rip)
    shrq    $16, %rax
    movl    %eax, park_gate_mce + 8(%rip)
    lgdt    park_gdtr(%rip)
    lidt    park_idtr(%rip)                         # from here on an NMI is survived, and a machine check if it is on

    leaq    park_flags(%rip), %rsp
    popfq                                           # NT off: iretq would fault on it
    leaq    park_frame(%rip), %rsp
    iretq                                           # CS, SS, RSP, RFLAGS; a far jump to a 64-bit offset AMD has not

# Every NMI and machine check starts again here, so each step from here on may be done twice.
park_ready:
    movl    ${cr0_long}, %eax
    movq    %rax, %cr0
    xorl    %eax, %eax
    movq    %rax, %dr7                              # no breakpoint of the last kernel's
    lldt    %ax
    movl    ${data}, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %fs                               # bases become 0 with the flat segment
    movl    %eax, %gs
    movl    ${msr_efer}, %ecx
    rdmsr
    btsl    ${efer_nxe_bit}, %eax                   # trampoline_start64 of Linux has NX bits in its tables
    btrl    ${efer_svme_bit}, %eax                  # and takes SVM for unused
    wrmsr

    movl    $1, %eax                                # machine checks on, which a CPU out of INIT has off: broadcast for
    cpuid                                           # another CPU's error, one would shut this CPU down, and with it the
    notl    %edx                                    # machine, under a kernel that could go on
    testl   ${cpuid_machine_checks}, %edx
    jnz     park_identify
    movq    %cr4, %rax
    orl     ${cr4_mce}, %eax
    movq    %rax, %cr4

park_identify:
    xorl    %eax, %eax
    cpuid
    cmpl    $0xb, %eax
    jb      park_id_8bit
    movl    $0xb, %eax
    xorl    %ecx, %ecx
    cpuid
    movl    %edx, %edi                              # the x2APIC id, valid in xAPIC mode too
    testl   %ebx, %ebx                              # no CPUs at the first level: the leaf is not there
    jnz     park_announce
park_id_8bit:
    movl    $1, %eax
    cpuid
    shrl    $24, %ebx
    movl    %ebx, %edi

park_announce:
    movl    %edi, park_epitaph_apic_id(%rip)
    movl    ${step_enter}, park_epitaph_step(%rip)
    movq    park_arg_mailbox(%rip), %rsi
    cmpl    ${mb_apic_ids}, %edi                    # the bitmap ends with the page
    jae     park_announced
    lock btsl %edi, {mb_parked}(%rsi)
    jc      park_announced                          # an NMI brought us here again
    lock incl {mb_count}(%rsi)
park_announced:
    movl    ${step_parked}, park_epitaph_step(%rip)

# PAUSE and no MONITOR/MWAIT: see README.md, "Waiting".
park_wait:
    pause
    movzwl  {mb_command}(%rsi), %eax
    testl   %eax, %eax
    jz      park_wait
    cmpl    %edi, {mb_apic_id}(%rsi)
    jne     park_wait
    # The command just read may still be another CPU's, acknowledged a moment ago, and the id the next request's, whose
    # vector and command are not written yet. The id is ours, though, and only we can end our request: so a command
    # read after it is ours, and what was written before that command can be seen.
    movzwl  {mb_command}(%rsi), %eax
    cmpl    ${command_wakeup}, %eax
    je      park_wake
    cmpl    ${command_test}, %eax
    jne     park_wait                               # none, or one that nobody has defined yet
    movl    ${step_tested}, park_epitaph_step(%rip)
    xorl    %ecx, %ecx
    lock cmpxchgw %cx, {mb_command}(%rsi)           # Linux gives up on a test after a second and may have asked anew
    jmp     park_wait

park_wake:
    movq    {mb_vector}(%rsi), %r8                  # before the acknowledgement: it may be overwritten after
    movl    ${step_woken}, park_epitaph_step(%rip)
    movl    %edi, park_epitaph_apic_id(%rip)
    cmpl    ${mb_apic_ids}, %edi
    jae     park_acknowledge
    lock btrl %edi, {mb_parked}(%rsi)
    jnc     park_acknowledge
    lock decl {mb_count}(%rsi)
park_acknowledge:
    xchgw   %bp, {mb_command}(%rsi)                 # acknowledges and marks this CPU as woken in one instruction: an
park_leave:                                         # NMI before it starts the wake again, one after it finishes it
    jmp     *%r8

park_nmi:
    testl   %ebp, %ebp
    jnz     park_leave                              # this CPU is the kernel's already; its first iret unblocks NMIs
    movq    park_arg_mailbox(%rip), %rax
    lock incl {mb_nmis}(%rax)
    leaq    park_frame(%rip), %rsp
    iretq                                           # to park_ready, and NMIs are unblocked

# As Linux does it on a CPU that is offline. Whether what was interrupted could go on does not matter: the wait starts afresh. What
# happened stays in the CPU's banks, for the kernel that gets it; one that an error concerns, and that runs, was told as well.
park_machine_check:
    movl    ${msr_mcg_status}, %ecx
    xorl    %eax, %eax
    xorl    %edx, %edx
    wrmsr                                           # no longer in progress: the next one would shut the CPU down
    testl   %ebp, %ebp
    jnz     park_leave
    movq    park_arg_mailbox(%rip), %rax
    lock incl {mb_machine_checks}(%rax)
    leaq    park_frame(%rip), %rsp
    iretq

# What is written at run time, away from the code. An NMI or a machine check pushes 40 bytes below rsp, rounded down to 16; rsp is one
# of park_scratch_top (= park_flags), its end, or park_frame, and below each there is room.
    .balign 256
    .skip   64
park_scratch_top:
park_flags:
    .quad   2                                       # RFLAGS: the bit that is always one
    .quad   0
    .skip   64
park_frame:
    .quad   0                                       # RIP = park_ready
    .quad   {code64}                                # CS
    .quad   2                                       # RFLAGS
    .quad   0                                       # RSP = park_scratch_top
    .quad   {data}                                  # SS
    .balign 16
park_idt:                                           # all others are not present, or past the limit: a fault still stops
    .quad   0, 0                                    # the CPU
    .quad   0, 0
park_gate_nmi:
    .word   0                                       # offset, bits 0-15
    .word   {code64}
    .word   0x8e00                                  # present, interrupt gate, no stack switch
    .word   0                                       # bits 16-31
    .long   0                                       # bits 32-63
    .long   0
    .fill   15 * 2, 8, 0                            # 3 to 17
park_gate_mce:                                      # 18, as above
    .word   0
    .word   {code64}
    .word   0x8e00
    .word   0
    .long   0
    .long   0
park_idt_end:
    .balign 8
    .skip   6                                       # so that the addresses are aligned
park_idtr:
    .word   park_idt_end - park_idt - 1
    .quad   0
    .skip   6
park_gdtr:
    .word   park_gdt_end - park_gdt - 1
    .quad   0
    .balign 8
park_gdt:                                           # the accessed bit is set, so that the CPU need not write here
    .quad   0
    .quad   0x00cf9b000000ffff                      # 32-bit code, as in the SIPI page
    .quad   0x00af9b000000ffff                      # {code64}: 64-bit code
    .quad   0x00cf93000000ffff                      # {data}: data, flat
park_gdt_end:

    .set    park_arg_cr3_4level, trampoline_park_page + {arg_cr3_4level}
    .set    park_arg_cr3_5level, trampoline_park_page + {arg_cr3_5level}
    .set    park_arg_mailbox, trampoline_park_page + {arg_mailbox}
    .set    park_epitaph_step, trampoline_park_page + {epitaph_step}
    .set    park_epitaph_apic_id, trampoline_park_page + {epitaph_apic_id}
    .org    trampoline_park_page + {args}           # fails to assemble when the code has grown into the arguments
    .org    trampoline_park_page + {page_size}
    .size   trampoline_park_page, {page_size}
    .popsection
