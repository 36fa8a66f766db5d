# The other side of every test in this folder: a firmware image's reset stub, a probe that notes down the state in which a CPU
# arrives, and an interpreter of scripts (script.rs), so that a test is written in Rust and not here.
#
# Lies in ROM at {guest}, runs there. Label prefix: guest_.

    .pushsection .rodata.trampoline_guest, "a", @progbits
    .balign 4096
    .globl  trampoline_guest
trampoline_guest:

# --- Reset: the boot CPU takes the same way as any other, through a SIPI page, as if a SIPI had brought it there.
    .code16
guest_reset:
    cli
    cld
    movw    ${boot_sipi_rom} >> 4, %ax
    movw    %ax, %ds
    movw    ${boot_sipi} >> 4, %ax
    movw    %ax, %es
    xorw    %si, %si
    xorw    %di, %di
    movw    $4096, %cx
    rep movsb
    movw    ${scripts} >> 4, %ax
    movw    %ax, %es
    movl    ${boot_script}, %es:0
    std                                             # the page has to cope
    ljmp    ${boot_sipi} >> 4, $0

# --- Probe: entered in 64-bit mode in an unknown state. No instruction before pushfq may change a flag.
    .code64
    .balign 16
    .globl  trampoline_guest_probe
trampoline_guest_probe:
guest_probe:
    endbr64
    movq    %rsp, %r8
    movq    %rsi, %r9
    movq    %rdi, %r10
    movq    %rax, %r11
    movq    %rbx, %r12
    movq    %rbp, %r13
    movl    $1, %eax
    cpuid
    bswapl  %ebx
    movzbl  %bl, %ebx                               # APIC id (tests have fewer than 256)
    leaq    (,%rbx,8), %rdi
    leaq    (,%rdi,8), %rdi
    leaq    (,%rdi,8), %rdi
    leaq    (,%rdi,8), %rdi                         # rdi = id * 4096
    leaq    {stacks}(%rdi), %rsp
    pushfq
    popq    %rax
    leaq    {records}(%rdi), %rsi
    movq    %rax, {rec_rflags}(%rsi)
    cld
    movq    %r8, {rec_rsp}(%rsi)
    movq    %r9, {rec_rsi}(%rsi)
    movq    %r10, {rec_rdi}(%rsi)
    movq    %r11, {rec_rax}(%rsi)
    movq    %r12, {rec_rbx}(%rsi)
    movq    %r13, {rec_rbp}(%rsi)
    movq    %cr0, %rax
    movq    %rax, {rec_cr0}(%rsi)
    movq    %cr3, %rax
    movq    %rax, {rec_cr3}(%rsi)
    movq    %cr4, %rax
    movq    %rax, {rec_cr4}(%rsi)
    movq    %dr7, %rax
    movq    %rax, {rec_dr7}(%rsi)
    movw    %cs, {rec_cs}(%rsi)
    movw    %ds, {rec_ds}(%rsi)
    movw    %es, {rec_es}(%rsi)
    movw    %ss, {rec_ss}(%rsi)
    movw    %fs, {rec_fs}(%rsi)
    movw    %gs, {rec_gs}(%rsi)
    sldt    {rec_ldt}(%rsi)
    sgdt    {rec_gdt_limit}(%rsi)
    sidt    {rec_idt_limit}(%rsi)
    movl    $0xc0000100, %ecx
    movl    ${rec_fs_base}, %edi
    call    guest_read_msr
    movl    $0xc0000101, %ecx
    movl    ${rec_gs_base}, %edi
    call    guest_read_msr
    movl    $0xc0000080, %ecx
    movl    ${rec_efer}, %edi
    call    guest_read_msr
    lock incq {rec_visits}(%rsi)
    movq    {scripts}(,%rbx,8), %r12
    jmp     guest_step

guest_read_msr:                                     # ecx = which, edi = offset in the record at rsi
    rdmsr
    movl    %eax, (%rsi,%rdi)
    movl    %edx, 4(%rsi,%rdi)
    ret

# --- Interpreter: r12 = next step; a step is four words: what, a (rdi), b (rsi), c (rdx).
guest_step:
    movq    (%r12), %rax
    movq    8(%r12), %rdi
    movq    16(%r12), %rsi
    movq    24(%r12), %rdx
    addq    $32, %r12
    leaq    guest_steps(%rip), %rcx
    movslq  (%rcx,%rax,4), %rax
    addq    %rcx, %rax
    jmp     *%rax

guest_exit:                                         # end the machine with code 2a + 1
    movl    %edi, %eax
    outb    %al, $0xf4
guest_halt:
    cli
    hlt
    jmp     guest_halt

guest_store:                                        # [a] = b
    movq    %rsi, (%rdi)
    jmp     guest_step

guest_store16:                                      # [a] = b
    movw    %si, (%rdi)
    jmp     guest_step

guest_store32:                                      # [a] = b
    movl    %esi, (%rdi)
    jmp     guest_step

guest_await:                                        # until [a] & b == c; the host's clock is the time limit
    pause
    movq    (%rdi), %rax
    andq    %rsi, %rax
    cmpq    %rdx, %rax
    jne     guest_await
    jmp     guest_step

guest_copy:                                         # a <- b, c bytes
    movq    %rdx, %rcx
    rep movsb
    jmp     guest_step

guest_ipi:                                          # to APIC id a (or a shorthand in b), interrupt command b
    call    guest_send
    jmp     guest_step

guest_send:                                         # edi = id, esi = command; changes rax, rcx, rdx
    movl    $0x1b, %ecx
    rdmsr
    btl     $10, %eax
    jc      guest_send_x2apic
    movl    $0xfee00000, %ecx
    movl    %edi, %eax
    shll    $24, %eax
    movl    %eax, 0x310(%rcx)
    movl    %esi, 0x300(%rcx)
guest_send_busy:
    pause
    testl   $0x1000, 0x300(%rcx)
    jnz     guest_send_busy
    ret
guest_send_x2apic:
    mfence
    movl    %edi, %edx
    movl    %esi, %eax
    movl    $0x830, %ecx
    wrmsr
    ret

guest_summon:                                       # command b to APIC id a, again and again until [c] has the bit a
    movq    %rdx, %r8
    movq    %rdi, %r9
guest_summon_on:
    movq    %r9, %rdi
    call    guest_send
    movl    $1000000, %edi
    call    guest_sleep
    btq     %r9, (%r8)
    jnc     guest_summon_on
    jmp     guest_step

guest_dump:                                         # b bytes at a to the debug console
    movq    %rsi, %rcx
    movq    %rdi, %rsi
    movl    $0xe9, %edx
    rep outsb
    jmp     guest_step

guest_x2apic:                                       # this CPU's APIC into x2APIC mode
    movl    $0x1b, %ecx
    rdmsr
    btsl    $10, %eax
    wrmsr
    jmp     guest_step

guest_efer:                                         # EFER = EFER & ~a | b
    movl    $0xc0000080, %ecx
    rdmsr
    notl    %edi
    andl    %edi, %eax
    orl     %esi, %eax
    xorl    %edx, %edx
    wrmsr
    jmp     guest_step

guest_delay:                                        # a TSC ticks
    call    guest_sleep
    jmp     guest_step

guest_sleep:                                        # rdi = ticks; changes rax, rcx, rdx
    rdtsc
    shlq    $32, %rdx
    leaq    (%rax,%rdx), %rcx
guest_sleep_on:
    pause
    rdtsc
    shlq    $32, %rdx
    orq     %rdx, %rax
    subq    %rcx, %rax
    cmpq    %rdi, %rax
    jb      guest_sleep_on
    ret

guest_beat:                                         # b times: [a] += 1, wait c ticks
    movq    %rdi, %r8
    movq    %rdx, %rdi
guest_beat_on:
    incq    (%r8)
    call    guest_sleep
    decq    %rsi
    jnz     guest_beat_on
    jmp     guest_step

guest_spin:                                         # [a] += 1 for ever: a CPU that runs and does not listen
    incq    (%rdi)
    jmp     guest_spin

guest_still:                                        # [c] = whether [a] stays the same for b ticks
    movq    (%rdi), %r9
    movq    %rdi, %r8
    movq    %rdx, %r10
    movq    %rsi, %rdi
    call    guest_sleep
    xorl    %eax, %eax
    cmpq    %r9, (%r8)
    sete    %al
    movq    %rax, (%r10)
    jmp     guest_step

guest_yield:                                        # into the yield page a with arguments b; [c] = what it did not keep
    pushq   %r12
    pushq   %rdx
    movq    %cr3, %rax
    pushq   %rax
    movq    %rsp, guest_saved_rsp_at
    movq    %rdi, %rax
    leaq    guest_yielded(%rip), %rdi
    movl    $0x11111111, %ebx
    movl    $0x22222222, %ebp
    movl    $0x33333333, %r12d
    movl    $0x44444444, %r13d
    movl    $0x55555555, %r14d
    movl    $0x66666666, %r15d
    std                                             # flags other than the arithmetic ones are kept
    jmp     *%rax
    .balign 16
guest_yielded:
    endbr64
    movq    guest_saved_rsp_at, %r9
    movl    $0x01, %eax
    cmpq    %rsp, %r9
    jne     guest_not_kept
    pushfq
    popq    %r10
    cld
    movl    $0x02, %eax
    testl   $0x200, %r10d                           # IF
    jnz     guest_not_kept
    movl    $0x04, %eax
    testl   $0x400, %r10d                           # DF
    jz      guest_not_kept
    movl    $0x08, %eax
    cmpq    $0x11111111, %rbx
    jne     guest_not_kept
    cmpq    $0x22222222, %rbp
    jne     guest_not_kept
    cmpq    $0x33333333, %r12
    jne     guest_not_kept
    cmpq    $0x44444444, %r13
    jne     guest_not_kept
    cmpq    $0x55555555, %r14
    jne     guest_not_kept
    cmpq    $0x66666666, %r15
    jne     guest_not_kept
    movl    $0x10, %eax
    movq    %cr3, %r10
    cmpq    %r10, (%rsp)
    jne     guest_not_kept
    xorl    %eax, %eax
guest_not_kept:
    movq    %r9, %rsp
    popq    %r10
    popq    %rdx
    popq    %r12
    movq    %rax, (%rdx)
    jmp     guest_step
    .set    guest_saved_rsp_at, {saved_rsp}

guest_die:                                          # as a kernel leaves: jump to a with CR4 |= b, CR3 = c, and nothing
    movq    %rdx, %r9                               # of its own left in order
    movl    $0xc0000100, %ecx
    movl    $0x5eed5eed, %eax
    movl    $0xffff8000, %edx
    wrmsr                                           # FS base
    movl    $0xc0000101, %ecx
    movl    $0x5eed5eed, %eax
    movl    $0xffff8000, %edx
    wrmsr                                           # GS base
    movq    %cr4, %rax
    orq     %rsi, %rax
    movq    %rax, %cr4
    movq    %rdi, %r8
    leaq    guest_probe(%rip), %rax      # a breakpoint where the CPU will come out again
    movq    %rax, %dr0
    movl    $0x401, %eax
    movq    %rax, %dr7
    leaq    guest_reset(%rip), %rax            # tables full of nonsense: code
    pushq   %rax
    pushq   %rax
    movw    $0x7ff, 6(%rsp)
    lgdt    6(%rsp)
    lidt    6(%rsp)
    movq    %cr0, %rax
    orl     $0x40008, %eax                          # TS, AM
    movq    %rax, %cr0
    pushq   $0x44402                                # AC, NT, DF
    popfq
    movq    %r9, %cr3
    movabsq $0x8000dead0000beef, %rsp               # not canonical: whoever pushes, dies
    jmp     *%r8

guest_la57:                                         # five levels: out of long mode and in again; a = top-level table
    movl    %edi, %r9d
    movq    %rsp, %r8
    leaq    {far32}, %rax
    leaq    guest_la57_32(%rip), %rcx
    movl    %ecx, (%rax)
    movl    $0x08, 4(%rax)                          # the SIPI page's descriptor tables are still in force
    leaq    guest_la57_64(%rip), %rcx
    movl    %ecx, 8(%rax)
    movl    $0x10, 12(%rax)
    movl    %r9d, %edi
    ljmpl   *(%rax)
    .code32
guest_la57_32:
    movl    %cr0, %ecx
    andl    $0x7fffffff, %ecx
    movl    %ecx, %cr0
    movl    %cr4, %edx
    orl     $0x1000, %edx
    movl    %edx, %cr4
    movl    %edi, %cr3
    orl     $0x80000000, %ecx
    movl    %ecx, %cr0
    ljmpl   *8(%eax)
    .code64
guest_la57_64:
    movq    %r8, %rsp
    jmp     guest_step

    .balign 4
guest_steps:                                        # the order of script.rs' enum
    .long   guest_halt - guest_steps
    .long   guest_exit - guest_steps
    .long   guest_store - guest_steps
    .long   guest_store16 - guest_steps
    .long   guest_store32 - guest_steps
    .long   guest_await - guest_steps
    .long   guest_copy - guest_steps
    .long   guest_ipi - guest_steps
    .long   guest_dump - guest_steps
    .long   guest_x2apic - guest_steps
    .long   guest_efer - guest_steps
    .long   guest_delay - guest_steps
    .long   guest_beat - guest_steps
    .long   guest_spin - guest_steps
    .long   guest_still - guest_steps
    .long   guest_yield - guest_steps
    .long   guest_die - guest_steps
    .long   guest_la57 - guest_steps
    .long   guest_summon - guest_steps

    .org    trampoline_guest + {guest_size}
    .size   trampoline_guest, {guest_size}
    .popsection
