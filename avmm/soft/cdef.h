int soft_load(const char *library, char *why, size_t size);
int soft_open(void);
int soft_ioctl(int fd, unsigned long request, void *argument);
int soft_close(int fd);
int soft_is(int fd);
void soft_kicked(void);
void soft_wrote(int vm, const void *host, uint64_t length);
uint64_t soft_function(int number);
void soft_take_away(unsigned cures);
